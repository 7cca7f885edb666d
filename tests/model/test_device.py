"""Which device PyTorch gets: a candidate that computes what the CPU does, else the CPU, with the reason."""

import pytest
import torch
from ppx.model import torch_device
from ppx.quant.devices import on_either


def test_a_candidate_that_agrees_is_taken():
    assert torch_device.chosen("cpu") == ("cpu", "")
    found = torch_device.one_block("cpu")
    assert all(bool(values.isfinite().all()) and float(values.norm()) > 0 for values in found.values())
    assert torch_device.chosen("mps", lambda _: found) == ("mps", "")


@pytest.mark.parametrize("name", ["the forward pass", "the second moments", "the error of GPTQ"])
def test_a_candidate_that_computes_something_else_is_left_alone(name):
    def block(where):
        found = torch_device.one_block("cpu")
        return found if where == "cpu" else found | {name: found[name] * 1.01}

    chosen, why = torch_device.chosen("mps", block)
    assert chosen == "cpu"
    assert f"on mps {name} is off by 0.01 (at most 0.001)" in why
    assert "\n" not in why


@pytest.mark.parametrize(
    "error", [NotImplementedError("no such operation\nmore"), TypeError("no float64"), RuntimeError("x")]
)
def test_a_candidate_on_which_a_block_does_not_run_is_left_alone(error):
    def block(where):
        if where != "cpu":
            raise error
        return torch_device.one_block(where)

    chosen, why = torch_device.chosen("mps", block)
    assert chosen == "cpu"
    assert why.startswith("PyTorch computes on the CPU: a block does not run on mps")
    assert "\n" not in why


def test_nan_does_not_agree():
    chosen, _ = torch_device.chosen(
        "mps", lambda where: {"it": torch.tensor([1.0 if where == "cpu" else float("nan")])}
    )
    assert chosen == "cpu"


def test_the_line_is_said_once_and_the_gpu_of_others_is_preferred(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch_device.device.cache_clear()
    assert torch_device.device() == torch_device.device() == "cpu"  # there is none here: a block does not run on it
    assert capsys.readouterr().err.count("PyTorch computes on the CPU") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch_device.device.cache_clear()
    assert torch_device.device() == "cuda"
    torch_device.device.cache_clear()


def test_an_operation_that_a_device_lacks_is_computed_on_the_cpu():
    calls = []

    def lacking(value):
        calls.append(value)
        if len(calls) == 1:
            raise NotImplementedError
        return torch.linalg.cholesky(value)

    value = torch.eye(3) * 4
    assert torch.equal(on_either(lacking, value), torch.eye(3) * 2)
    assert len(calls) == 2
