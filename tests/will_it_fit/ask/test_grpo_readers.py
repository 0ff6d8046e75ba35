"""Files of GRPO trainings: what of the cycle is understood, and what decides and is not described."""

from pathlib import Path

import pytest

from tests.will_it_fit.ask.test_readers import asked, said

needs_trl = pytest.mark.skipif("not __import__('importlib').util.find_spec('trl')")
TRL = {"model_name_or_path": "meta-llama/Llama-3.2-1B", "dataset_name": "x", "num_generations": 4,
       "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": 256}  # fmt: skip


@needs_trl
def test_a_file_of_trl_is_its_own_step_and_not_supervised_fine_tuning(tmp_path: Path) -> None:
    found = asked(tmp_path, TRL)
    said(
        found,
        objective="grpo",
        sequence_length=512 + 256,
        loss="full",
        preference={"generations": 4, "completion_length": 256, "reference": None},
        generation={"engine": "transformers", "steps_per_generation": None, "iterations": 1},
    )
    assert not any(remark.key == "trainer" for remark in found.reading.remarks)


@needs_trl
@pytest.mark.parametrize(("adapters", "reference"), [(False, "model"), (True, "adapter_off")])
def test_beta_brings_a_reference(adapters: bool, reference: str, tmp_path: Path) -> None:
    found = asked(tmp_path, TRL | {"beta": 0.04, "use_peft": adapters, "steps_per_generation": 4, "num_iterations": 2})
    said(found, preference={"reference": reference}, generation={"steps_per_generation": 4, "iterations": 2})
