"""The names that libraries keep to themselves and this project relies on: each is there, and no other is used.

When a new version lacks one, the message says who relied on it. Read in the library's source what took its place, or
keep torch's range in `pyproject.toml` below that version.
"""

import ast
import inspect
import re
from collections import defaultdict
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pkgutil import resolve_name

import pytest

from tests.repository import ROOT

HOUSES = ("dryfit", "scripts")

FSDP, FSDP2, DATA_PARALLEL = (
    "torch.distributed.fsdp",
    "torch.distributed.fsdp._fully_shard",
    "torch.nn.parallel",
)
PIPELINES = "torch.distributed.pipelining"
ZERO = "deepspeed.runtime.zero"
# By what they belong to. A name that objects of a class get when they are made counts as the class's.
RELIED_ON = {
    "diffusers.FluxPipeline": "_pack_latents _prepare_latent_image_ids _unpack_latents",
    "liger_kernel.transformers.monkey_patch": "_apply_liger_kernel_to_instance",
    "accelerate.big_modeling": (
        "_attach_context_parallel_hooks _refuse_recurrent_layers_under_sequence_parallelism"
    ),
    "accelerate.state.AcceleratorState": "_mixed_precision _reset_state",
    "accelerate.state.GradientState": "_reset_state",
    "bitsandbytes.autograd": "_functions",
    "bitsandbytes.nn.parametrize": "_disable_parametrization_cache _enable_parametrization_cache",
    "peft.tuners.lora.layer": "_LoraFactorsProxy",
    "snakemake.api.WorkflowApi": "_workflow",
    "snakemake.persistence.PersistenceBase": "_filter_incomplete_keys _params",
    "snakemake.iocontainers.Namedlist": "_get_names _set_name",
    "subprocess.Popen": "_child_created",
    "peft.tuners._buffer_dict": "BufferDict",
    "peft.tuners.tuners_utils.BaseTunerLayer": "_disable_adapters _move_adapter_to_device_of_base_layer",
    "trl.kernels.chunked_logprob": "_addmm_fp32 _use_triton",
    "trl.trainer.grpo_trainer.GRPOTrainer": "_last_loaded_step",
    "trl.trainer.rloo_trainer.RLOOTrainer": "_generate_single_turn",
    "trl.experimental.online_dpo.OnlineDPOTrainer": "_generate",
    "torch.Tensor": "_indices _is_view _nnz _use_count _values",
    "torch.UntypedStorage": "_cdata _new_with_weak_ptr",
    "torch._C": (
        "DisableTorchFunction _GLIBCXX_USE_CXX11_ABI _current_autograd_node _current_graph_task_id _get_accelerator"
        " _get_function_stack_at _len_torch_function_stack _nn _only_lift_cpu_tensors _pop_torch_function_stack"
        " _push_on_torch_function_stack _set_only_lift_cpu_tensors _swap_tensor_impl _len_torch_dispatch_stack"
        " _get_dispatch_stack_at _set_cached_tensors_enabled _storage_Use_Count"
    ),
    "torch": (
        "_VF _disable_dynamo _has_compatible_shallow_copy_type _library _log_softmax _prims_common _safe_softmax"
        " _softmax _utils"
    ),
    "torch._utils": "_flatten_dense_tensors _unflatten_dense_tensors",
    "torch.ops.mkldnn": "_is_mkldnn_bf16_supported",
    "torch.cuda.memory": "_dump_snapshot",
    "transformers.Trainer": "_maybe_log_save_evaluate",
    "torch._prims_common": "elementwise_dtypes",
    "torch.fx.experimental.symbolic_shapes": (
        "expect_true free_unbacked_symbols guard_int guard_or_false guard_or_true guard_size_oblivious is_nested_int"
        " statically_known_true sym_and sym_eq sym_or"
    ),
    # CUDA graphs (cuda_graphs.py), seen in torch 2.13; most names of `torch._C` are those of a build with CUDA alone:
    "torch.cuda.graphs": "_host_emptyCache",
    "torch._inductor.cudagraph_trees": (
        "_use_cuda_memory_pool_manager _update_current_stream_external_object disable_conv_cache_emptying"
        " ControlFlowOpWarmupDispatchMode CUDAGraphCaptureControlFlowOpDispatchMode reset_cudagraph_trees"
        " _construct_storage_from_data_pointer _construct_CUDA_Tensor_From_Storage_And_Metadata"
        " _cuda_getCheckpointState _cuda_setCheckpointPoolState _cuda_checkPoolLiveAllocations"
        " _cuda_cudaCachingAllocator_raw_delete _free_And_Remove_DeleterFn _has_Standard_Deleter"
        " _set_storage_access_error_msg _set_storage_data_ptr_access_error_msg _tensors_data_ptrs_at_indices_equal"
        " _cuda_clearCublasWorkspaces"
    ),
    "torch._inductor.cudagraph_utils": "_cuda_cudaCachingAllocator_is_enabled",
    # What follows the compiler (inductor.py, frames.py), seen in torch 2.13:
    "torch._dynamo.convert_frame": "CatchErrorsWrapper add_skip_reason format_error_msg",
    "torch._dynamo.device_interface": "CudaInterface get_interface_for_device",
    "torch._dynamo.trace_rules": "SkipResult add check_file clear_lru_cache lookup",
    "torch._dynamo.variables.torch": "constant_fold_functions",
    "torch._dynamo.utils": "graph_break_reasons",
    "torch._dynamo.variables.streams": "SymbolicStreamState",
    "torch._functorch._aot_autograd.graph_compile": "is_opaque_node is_sym_node",
    "torch.distributed.device_mesh.DeviceMesh": "_device_type",
    "torch._functorch.config": "enable_autograd_cache fake_tensor_allow_meta graphsafe_rng_functionalization",
    "torch._inductor.async_compile": "AsyncCompile",
    "torch._inductor.codecache.PyCodeCache": "load_by_key_path",
    "torch._inductor.codegen.triton.TritonKernel": "estimate_kernel_num_bytes inductor_meta_per_kernel",
    "torch._higher_order_ops.wrap": "inductor_compiled_code",
    "torch._inductor.output_code": "is_in_torch_dispatch_mode",
    "torch._inductor.compile_fx": "compile_fx compile_fx_inner",
    "torch._inductor.fx_passes.joint_graph": "UniformValueConstantFolder lazy_init",
    "torch._inductor.fx_passes.pad_mm": "get_cached_should_pad",
    "torch._inductor.runtime.cache_dir_utils": "cache_dir",
    "torch._inductor.runtime.hints": "DeviceProperties",
    "torch._inductor.utils": "get_max_num_sms is_big_gpu",
    "torch._inductor.select_algorithm": "AlgorithmSelectorCache TritonTemplateCaller",
    "torch._prims.rng_prims": "run_and_save_rng_state run_with_rng_state",
    "torch._subclasses.fake_tensor": "init_gpu_context",
    "torch.fx.experimental.proxy_tensor": "unset_fake_temporarily",
    "torch._subclasses.meta_utils": "MetaTensorDescriber",
    "torch.utils._triton": "has_triton_package",
    "torch.nn.modules.module": "_global_forward_hooks _global_forward_pre_hooks",
    "torch._library.custom_ops": "OPDEFS",
    "torch.library.Library": "_destroy",
    "torch._library.custom_ops.CustomOpDef": "_backend_fns",
    "torch.utils._device": "_device_constructors",
    "triton.runtime.driver": "_active",  # of its object `driver`
    "torch._dynamo.eval_frame": "DynamoStance _callback_from_stance _maybe_set_eval_frame _stance",
    "torch._C._autograd": "_get_sequence_nr",
    "torch._guards": "active_fake_mode",
    "torch._meta_registrations": "_create_grouped_mm_output_tensor _meta_grouped_mm_common",
    "torch.ops.aten.mm.default": "_overloadpacket _schema",
    "torch.autograd": "_engine_run_backward",
    "torch.autograd.graph.Node": "_sequence_nr",
    "torch._C._distributed_c10d": "FakeWork",
    "torch.cuda": "_compile_kernel _exchange_device _maybe_exchange_device",
    "torch.amp.GradScaler": "_maybe_opt_step",
    "torch.nn.init": "_no_grad_trunc_normal_",
    "torch.utils.data.DataLoader": "_auto_collation _get_iterator _index_sampler",
    "torch.utils.data.dataloader": "_BaseDataLoaderIter _DatasetKind _SingleProcessDataLoaderIter",
    "torch.utils.data.dataloader._BaseDataLoaderIter": "_dataset _dataset_kind _next_index",
    "torch.distributed.Backend": "_plugins",
    f"{FSDP}._flat_param": "_no_dispatch_record_stream",
    f"{FSDP}._init_utils": "_move_module_to_device",
    f"{FSDP}._runtime_utils": "_no_dispatch_record_stream",
    f"{FSDP2}._fsdp_init": "_move_states_to_device",
    f"{FSDP2}._fsdp_param": "ShardedState",
    f"{FSDP2}._fsdp_param.FSDPParam": "_init_sharded_param _sharded_param_data all_gather_inputs offload_to_cpu",
    f"{FSDP2}._fsdp_param_group": "foreach_reduce",
    f"{FSDP2}._fsdp_param_group.FSDPParamGroup": "_validate_cpu_offload_params _validate_no_meta_params",
    "torch.distributed": "_functional_collectives",
    "torch.distributed.tensor.experimental": "_attention",
    "torch.distributed.distributed_c10d": "_resolve_process_group",
    PIPELINES: "_utils",
    f"{PIPELINES}._utils": "_StageBackwardMeta _derive_grad_metas",
    f"{PIPELINES}.schedules": "_PipelineSchedule",
    f"{PIPELINES}.schedules._PipelineSchedule": "_warmup_p2p",
    f"{PIPELINES}.stage.PipelineStage": "_inference_mode _recv_meta _send_meta _stage_meta _user_meta",
    "torch.distributed.tensor": "_collective_utils _dispatch _random _redistribute",
    "torch.distributed.tensor.DTensor": "_local_tensor _op_dispatcher",
    "torch.distributed.tensor._redistribute": "_gen_transform_infos",
    "torch.distributed.tensor._dispatch.ShardingPropagator": "_propagate_tensor_meta_cached",
    "torch.distributed.tensor.debug": "_clear_sharding_prop_cache",
    "transformers.distributed.tensor_parallel.TensorParallelLayer": "_from_local_last_dim_shard",
    "torch.nn.Module": "_apply _buffers _parameters",
    f"{DATA_PARALLEL}.distributed": "_verify_param_shape_across_processes",
    f"{DATA_PARALLEL}.DistributedDataParallel": "_pre_forward",
    "torch.ops._c10d_functional": "_wrap_tensor_autograd wait_tensor",
    "torch.ops.aten": (
        "_fft_c2c _fft_c2r _fft_r2c _local_scalar_dense _scaled_dot_product_efficient_attention"
        " _scaled_dot_product_flash_attention"
        " _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward _to_copy"
        " _pin_memory _scaled_dot_product_attention_math _copy_from _ctc_loss_backward _efficientzerotensor"
        " _unsafe_view"
    ),
    "torch.optim.optimizer": (
        "_get_capturable_supported_devices _global_optimizer_post_hooks _global_optimizer_pre_hooks"
    ),
    "torch.testing._internal.distributed.fake_pg": "FakeStore _create_fake_pg",
    "torch.utils._python_dispatch": (
        "TorchDispatchMode _disable_current_modes _get_current_dispatch_mode _get_current_dispatch_mode_stack"
    ),
    "torch.utils._pytree": "tree_flatten tree_leaves tree_map tree_map_only tree_unflatten",
    "torch.utils._foreach_utils": (
        "_device_has_foreach_support _get_foreach_kernels_supported_devices _get_fused_kernels_supported_devices"
    ),
    "transformers.PreTrainedModel": (
        "_from_config _no_split_modules _resolve_parallel_plans _supports_flash_attn _supports_sdpa"
    ),
    "transformers.PretrainedConfig": "_attn_implementation",
    "transformers.TrainingArguments": "_setup_devices",
    "transformers.modeling_utils": "_is_hf_initialized",
    "transformers.quantizers.base.HfQuantizer": "_process_model_before_weight_loading",
    "deepspeed.runtime.sequence_parallel.ulysses_sp": "_dim_zero_all_to_all",
    "torch.distributed.ProcessGroup": "_set_group_desc",
    f"{ZERO}.partition_parameters.AllGatherHandle": "_AllGatherHandle__param",
    f"{ZERO}.partition_parameters.Init": "_all_gather _convert_to_zero_parameters",
}
PARTS = {part for owner, names in RELIED_ON.items() for part in [*owner.split("."), *names.split()]}
# Python's own, a key of Hugging Face's configuration files, what a PyTorch without CUDA lacks and is lent,
# and what Dynamo hangs on the functions that it wraps.
ELSEWHERE = {
    "_cuda_getCurrentRawStream",
    "_torchdynamo_orig_callable",
    "_actions",
    "_asdict",
    "_current_frames",
    "_exit",
    "_getframe",
    "_name_or_path",
    "_replace",
}


@cache
def uses() -> dict[str, set[str]]:
    """The private names in the code that are not its own, each with the files that use it."""
    found, own = defaultdict(set), set()
    for path in sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py")):
        place = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            match node:
                case (
                    ast.FunctionDef(name=name)
                    | ast.ClassDef(name=name)
                    | ast.Name(id=name, ctx=ast.Store())
                ):
                    own.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name):
                    names = [name]
                case ast.Tuple(
                    elts=[_, ast.Constant(value=str(name)), _]
                ):  # as engine/patching.py takes it
                    names = [name]
                case ast.Call(
                    func=ast.Name(id="getattr" | "setattr"),
                    args=[_, ast.Constant(value=str(name)), *_],
                ):
                    names = [name]
                case ast.ImportFrom(module=str(module), level=0, names=imported) if (
                    module.split(".")[0] not in HOUSES
                ):
                    names = [*module.split("."), *(one.name for one in imported)]
                case ast.Import(names=imported):
                    names = [part for one in imported for part in one.name.split(".")]
            for name in names:
                if re.match(r"_[A-Za-z]", name):
                    found[name].add(str(place))
    return {name: places for name, places in found.items() if name not in own | ELSEWHERE}


@pytest.mark.parametrize("owner", RELIED_ON)
def test_the_library_still_has_what_the_project_relies_on(owner: str) -> None:
    library = owner.partition(".")[0]
    if not find_spec(library):
        pytest.skip(f"{library} is not installed here")
    try:
        place = resolve_name(owner)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{library} {version(library)} has no {owner} any more ({error})")
    for name in RELIED_ON[owner].split():
        written = name.removeprefix(
            f"_{place.__name__}"
        )  # a class writes its own self.__name without the prefix
        there = hasattr(place, name) or re.search(rf"\b{written}\b", inspect.getsource(place))
        users = ", ".join(sorted(uses().get(name, ()))) or "the project"
        assert there, (
            f"{library} {version(library)} has no {owner}.{name} any more; {users} relies on it"
        )


def test_every_private_name_in_use_is_listed_here() -> None:
    unlisted = {name: sorted(places) for name, places in uses().items() if name not in PARTS}
    assert not unlisted, f"add to RELIED_ON what these belong to: {unlisted}"


@pytest.mark.thorough
def test_no_name_is_listed_that_nobody_uses() -> None:
    private = {part for part in PARTS if re.match(r"_[A-Za-z]", part)}
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for house in HOUSES
        for path in (ROOT / house).rglob("*.py")
    )
    assert not {name for name in private if not re.search(rf"\b{name}\b", text)}


def test_operators_that_the_engine_knows_by_name_are_there() -> None:
    import bitsandbytes  # noqa: F401, registers its own
    import torch

    text = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "dryfit" / "engine").glob("*.py")
    )
    named = set(re.findall(r'"((?:aten|bitsandbytes)::\w*\w)(?<!_foreach_)(?<!_fused_)"', text))
    missing = {
        name
        for name in named
        if not hasattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1])
    }
    assert len(named) > 8 and not missing, (
        f"torch {torch.__version__} or bitsandbytes lacks {missing}"
    )
