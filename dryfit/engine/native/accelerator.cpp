/* What autograd of fake tensors asks about CUDA, answered in a build without it: see accelerator.py.

   The hooks' object is made when PyTorch starts, and nobody can replace it. Its table of virtual functions is that of
   another object of a class below the same base, for a while: both have no members. The compiler knows the places. */
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>

namespace {
using c10::DeviceType;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }  // no thread of autograd is started for it
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

const Guard guard;
const Hooks hooks;
const c10::impl::DeviceGuardImplInterface* guard_before = nullptr;
void* table_before = nullptr;
}  // namespace

extern "C" void simulate(bool on) {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  auto& place = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  void* object = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (on) {
    guard_before = place.exchange(&guard);
    std::memcpy(&table_before, object, sizeof(void*));
    std::memcpy(object, static_cast<const void*>(&hooks), sizeof(void*));
  } else {
    place.store(guard_before);
    std::memcpy(object, &table_before, sizeof(void*));
  }
}
