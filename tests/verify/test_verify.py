"""ppx-verify from end to end: what it says, what it leaves, how it ends."""

import json
import re
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ppx.convert.tensorfile import TensorFile
from ppx.verify import report as reports
from ppx.verify.records import Report
from safetensors.numpy import load_file, save_file

QUICK = ("--sequences", "1", "--frames", "40")
SWIFT = ("--recipe", "4bit")
FLOAT = ("--recipe", "bf16")


@pytest.fixture
def mine(bundle, tmp_path):
    """A copy of a bundle that a report may be written into."""

    def copy(*options, name="mine"):
        shutil.copytree(bundle(*options), tmp_path / name)
        return tmp_path / name

    return copy


@pytest.fixture(scope="module")
def verified(bundle, program, pico, tmp_path_factory):
    """Return a bundle with a quick report, and what ppx-verify --json printed; made once for each choice of options."""
    made: dict[tuple[str, ...], tuple[Path, Any]] = {}

    def verify(*options):
        if options not in made:
            folder = tmp_path_factory.mktemp("verified") / "bundle"
            shutil.copytree(bundle(*options), folder)
            done = program("ppx-verify", folder, "--reference", pico, *QUICK, "--json", cwd=folder.parent)
            made[options] = folder, done
        return made[options]

    return verify


def left(folder: Path) -> Any:
    return json.loads((folder / "parity" / "report.json").read_text())


def test_an_untouched_float_bundle_passes_with_its_noise_floor(mine, program, pico, tmp_path):
    folder = mine(*FLOAT)
    done = program("ppx-verify", folder, "--reference", pico, *QUICK, "--rollout", "8", cwd=tmp_path)
    assert "is intact: 1 sequence of 40 frames, system prompt" in done.stdout
    assert "a greedy session of 8 frames on both: no difference; 100% of the agent's tokens agree" in done.stdout
    report = left(folder)
    assert report["verdict"] == {"passed": True, "failures": []}
    for stream in ("text", "codebook_0", "agent"):
        held = report["predictions"][stream]
        assert held["bundle"]["kl"]["mean"] < 1e-9
        assert 1e-7 < held["noise"]["kl"]["mean"] < 1e-2
    assert all(row["unequal"] == 0 for row in report["weights"])


def test_a_float_bundle_computed_in_its_own_dtype_is_at_the_noise_floor(mine, program, pico, tmp_path):
    folder = mine(*FLOAT)
    program("ppx-verify", folder, "--reference", pico, *QUICK, "--arithmetic", "bundle", cwd=tmp_path)
    report = left(folder)
    assert report["arithmetic"] == "bfloat16"
    assert report["verdict"]["passed"]
    kl = {which: report["predictions"]["agent"][which]["kl"]["mean"] for which in ("bundle", "noise")}
    assert kl["noise"] / 3 < kl["bundle"] < 3 * kl["noise"]


def test_what_is_left_in_the_bundle(mine, program, pico, tmp_path):
    folder = mine(*SWIFT)
    done = program("ppx-verify", folder, "--reference", pico, *QUICK, "--rollout", "5", cwd=tmp_path)
    assert sorted(path.name for path in (folder / "parity").iterdir()) == ["report.html", "report.json", "report.md"]
    assert not list(folder.glob(".parity*"))
    report = left(folder)
    assert f"report: {folder / 'parity' / 'report.html'}" in done.stdout
    assert report["command"] == f"ppx-verify mine --reference path/to/{pico.name} --sequences 1 --frames 40 --rollout 5"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert report["bundle"]["files"] == manifest["files"]
    tensors = {name for entry in manifest["tensors"] for name in entry.get("outputs", ())[:1]}
    assert {row["tensor"] for row in report["weights"]} == tensors
    blocks = {(row["component"], row["layer"], row["part"], row["step"]) for row in report["activations"]}
    layers, steps = range(2), range(16)
    assert {("temporal", layer, part, None) for layer in layers for part in ("attention", "mlp")} <= blocks
    expected = {("depformer", layer, part, s) for layer in layers for part in ("attention", "mlp") for s in steps}
    assert expected <= blocks
    assert set(report["predictions"]) == {"text", "agent", "user", *(f"codebook_{n}" for n in steps)}
    assert len(report["rollout"]["agreement"]) == 5
    page = (folder / "parity" / "report.html").read_text()
    assert page.count("<svg") == 2 * 5  # for a phone and for a wide page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "prefers-color-scheme: dark" in page
    assert "layers.1.gating.linear_in.weight" in page
    assert page.count("<strong") == 1  # the first line: no reason to fail
    summary = (folder / "parity" / "report.md").read_text()
    assert summary.startswith("# Intact: 4bit for speech-swift")
    assert len(summary.splitlines()) < 60
    for text in (page, summary, json.dumps(report)):
        assert str(tmp_path) not in text
        assert str(pico.parent) not in text
    program("ppx-inspect", folder, "--check", cwd=tmp_path)  # the report is no stranger there


def test_reports_of_the_same_input_are_the_same_but_for_times(verified, mine, program, pico, tmp_path):
    folders = [verified(*SWIFT)[0], mine(*SWIFT, name="second")]
    program("ppx-verify", folders[1], "--reference", pico, *QUICK, "--json", cwd=tmp_path)
    found = []
    for folder in folders:
        report = left(folder)
        assert report.pop("times").keys() == {"began", "seconds"}
        given = f"--reference path/to/{pico.name} --sequences 1 --frames 40"
        assert report.pop("command") == f"ppx-verify {folder.name} {given}"
        found.append(json.dumps(report))
    assert found[0] == found[1]
    pictures = [
        re.findall(r"<svg.*?</svg>", (folder / "parity" / "report.html").read_text(), re.DOTALL) for folder in folders
    ]
    assert pictures[0] == pictures[1]


def test_json_on_standard_output_is_the_report(verified):
    folder, done = verified(*SWIFT)
    assert json.loads(done.stdout) == left(folder)
    assert done.stderr == ""


def test_recorded_tokens_are_scored(mine, program, pico, tmp_path):
    folder = mine(*SWIFT)
    tokens = pico / "heldout_tokens.safetensors"
    options = ("--tokens", tokens, "--sequences", "2", "--frames", "50")
    program("ppx-verify", folder, "--reference", pico, *options, cwd=tmp_path)
    report = left(folder)
    assert report["material"] == {"kind": "tokens", "file": tokens.name, "sequences": 2, "frames": 50}
    for stream, positions in (("text", 100), ("codebook_0", 100), ("codebook_3", 98), ("codebook_8", 100)):
        held = report["predictions"][stream]["bundle"]
        assert held["positions"] == held["loss"]["positions"] == positions  # delayed streams lose a frame
        assert held["loss"]["perplexity_ratio"] == pytest.approx(np.exp(held["loss"]["change"]), rel=1e-4)
    held = report["predictions"]["agent"]["bundle"]
    eight = [report["predictions"][f"codebook_{n}"]["bundle"]["kl"]["mean"] for n in range(8)]
    assert held["kl"]["mean"] == pytest.approx(np.mean(eight), rel=1e-4)


def test_figures_of_mx_quantize_are_those_that_the_reference_code_gives(bundle, program, pico, tmp_path):
    """The agent's divergence that NVIDIA's code shows with weights that mx.quantize made: 24 sequences, 200 frames."""
    shutil.copytree(bundle("--bits", "4", "--method", "rtn", "--dtype", "bfloat16"), tmp_path / "mine")
    options = ("--tokens", pico / "heldout_tokens.safetensors", "--sequences", "24", "--frames", "200")
    program("ppx-verify", "mine", "--reference", pico, *options, cwd=tmp_path)
    found = left(tmp_path / "mine")["predictions"]["agent"]["bundle"]
    assert found["kl"]["mean"] == pytest.approx(0.0586, rel=0.01)


def test_a_failing_bundle_ends_with_one_and_says_why(pico, program, tmp_path):
    (tmp_path / "strict.toml").write_text(
        '[[rules]]\ncomponents = ["temporal"]\nbits = 4\ngroup_size = 64\n[parity]\nagent_kl = 0.000001\n'
    )
    done = program("ppx-convert", pico, "--recipe", "strict.toml", "-o", "out", "--verify", cwd=tmp_path, status=1)
    assert "out is not intact: 3 sequences" in done.stdout
    assert "KL of the agent's codebooks is" in done.stderr
    assert "at most 1e-06 is allowed" in done.stderr
    page = (tmp_path / "out" / "parity" / "report.html").read_text()
    assert "Why it fails" in page
    report = left(tmp_path / "out")
    assert report["limits"]["agent_kl"] == 0.000001
    assert 0.001 < report["limits"]["text_kl"] < 0.1  # a factor of what plain rounding loses
    assert [failure["check"] for failure in report["verdict"]["failures"]] == ["predictions"]
    assert (tmp_path / "out" / "manifest.json").is_file()  # the bundle stays, to be looked at


def test_a_conversion_verifies_at_its_end(pico, program, tmp_path):
    done = program("ppx-convert", pico, "--bits", "8", "-o", "out", "--verify", cwd=tmp_path)
    assert "out is intact: 3 sequences" in done.stdout
    assert left(tmp_path / "out")["verdict"]["passed"]
    done = program("ppx-convert", pico, "--bits", "8", "-o", "out", "--verify", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert (said["files_made"], said["verdict"]) == (0, {"passed": True, "failures": []})
    program("ppx-convert", pico, "--bits", "8", "-o", "unverified", cwd=tmp_path)
    assert not (tmp_path / "unverified" / "parity").exists()


def test_converting_again_keeps_a_report_on_chosen_tokens(bundle, program, pico, tmp_path):
    shutil.copytree(bundle(*SWIFT), tmp_path / "out")
    convert = ("ppx-convert", pico, *SWIFT, "--output", "out", "--verify")
    chosen = ("--tokens", pico / "heldout_tokens.safetensors", "--sequences", "2", "--frames", "20")
    assert "sharper" in program(*convert, cwd=tmp_path).stdout
    assert "sharper" not in program("ppx-verify", "out", "--reference", pico, *chosen, cwd=tmp_path).stdout
    made = (tmp_path / "out" / "parity" / "report.json").read_bytes()
    assert "out is intact: 2 sequences of 20 frames, tokens" in program(*convert, cwd=tmp_path).stdout
    assert (tmp_path / "out" / "parity" / "report.json").read_bytes() == made


def test_two_bundles_side_by_side(verified, program, pico, tmp_path):
    folders = [tmp_path / "four", tmp_path / "eight"]
    for folder, options in zip(folders, (SWIFT, ("--bits", "8")), strict=True):
        shutil.copytree(verified(*options)[0], folder)
    said = program("ppx-verify", *folders, cwd=tmp_path).stdout
    assert re.search(r"^verdict +intact +intact$", said, re.MULTILINE)
    assert re.search(r"^bytes +\S+ MB +\S+ MB +◀ A$", said, re.MULTILINE)
    assert re.search(r"^KL of the agent's codebooks .*B ▶$", said, re.MULTILINE)
    assert "warning" not in said
    files = [folder / "parity" / "report.json" for folder in folders]
    found = json.loads(program("ppx-verify", *files, "--json", cwd=tmp_path).stdout)
    better = {row["name"]: row["better"] for row in found["sizes"] + found["figures"]}
    assert (better["bytes"], better["KL of text"], better["top-1 agreement of the agent's codebooks"]) == (
        "a",
        "b",
        "b",
    )
    assert found["tensors"]["better"]["b"] > 50
    assert found["tensors"]["better"]["a"] == 0
    assert len(found["blocks"]["most_different"]) == 5
    program("ppx-verify", folders[1], "--reference", pico, "--frames", "30", cwd=tmp_path)
    said = program("ppx-verify", *folders, cwd=tmp_path).stdout
    assert (
        "different evaluation tokens: kind system prompt, sequences 1, frames 40 and kind system prompt, sequences 3"
        in said
    )
    names = [row["name"] for row in found["figures"]]
    assert len(names) == len(set(names))


def test_targets_side_by_side(verified, program, tmp_path):
    """Tensors are the same ones under any target's names."""
    folders = [verified(*SWIFT)[0], verified("--recipe", "moshi-q4")[0]]
    found = json.loads(program("ppx-verify", *folders, "--json", cwd=tmp_path).stdout)
    assert sum(found["tensors"]["better"].values()) > 250


def test_a_bundle_that_cannot_be_read_fails_with_a_report(mine, program, pico, tmp_path):
    folder = mine(*SWIFT)
    path = folder / "depformer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = program("ppx-verify", folder, "--reference", pico, cwd=tmp_path, status=1)
    assert "depformer.safetensors" in done.stderr
    assert (folder / "parity" / "report.md").read_text().startswith("# Not intact")
    assert "Why it fails" in (folder / "parity" / "report.html").read_text()
    assert left(folder)["predictions"] == {}
    (folder / "config.json").write_text("{")
    program("ppx-verify", folder, "--reference", pico, cwd=tmp_path, status=1)
    assert any("config.json" in failure["place"] for failure in left(folder)["verdict"]["failures"])


def test_weights_that_are_not_finite_fail_with_a_report(mine, program, pico, tmp_path):
    folder = mine(*SWIFT)
    opened = TensorFile(folder / "temporal.safetensors")
    with (folder / "temporal.safetensors").open("r+b") as file:
        file.seek(opened.offsets["layers.1.gating.linear_out.scales"])
        file.write(np.array([np.nan], np.float16).tobytes())
    opened.close()
    program("ppx-verify", folder, "--reference", pico, *QUICK, cwd=tmp_path, status=1)
    report = left(folder)
    messages = [failure["message"] for failure in report["verdict"]["failures"]]
    assert any("layers.1.gating.linear_out.weight: relative error nan" in message for message in messages)
    assert any("it starts at temporal layer 1 mlp" in message for message in messages)
    assert report["predictions"]["text"]["bundle"]["kl"]["mean"] is None
    assert "not finite" in (folder / "parity" / "report.md").read_text()


class TestWhatCannotBeCompared:
    def test_another_source(self, bundle, program, tmp_path):
        done = program("ppx-verify", bundle(*SWIFT), "--reference", "demo", cwd=tmp_path, status=2)
        assert "not the one that the bundle was made from (pico)" in done.stderr
        assert not (bundle(*SWIFT) / "parity").exists()

    def test_no_source_named_and_none_known(self, bundle, program, tmp_path):
        done = program("ppx-verify", bundle(*SWIFT), cwd=tmp_path, status=2)
        assert "was made from a folder called pico: give it as --reference" in done.stderr

    def test_no_bundle(self, pico, program, tmp_path):
        for path, words in ((pico, "not a bundle"), (tmp_path / "nothing", "not a bundle")):
            done = program("ppx-verify", path, "--reference", pico, cwd=tmp_path, status=2)
            assert words in done.stderr

    def test_reports_that_are_none(self, bundle, program, tmp_path):
        done = program("ppx-verify", bundle(*SWIFT), bundle(*SWIFT), cwd=tmp_path, status=2)
        assert "run ppx-verify" in done.stderr
        texts = ("", "[]", '{"report_version": 1}', '{"report_version": 99, "verdict": {}}', "[" * 100_000)
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.json").write_text(text)
            done = program("ppx-verify", f"{number}.json", f"{number}.json", cwd=tmp_path, status=2)
            assert "not a report" in done.stderr

    def test_a_report_that_commands_a_terminal(self, verified, program, tmp_path):
        folder = verified(*SWIFT)[0]
        report = left(folder)
        damages: tuple[dict[str, object], ...] = (
            {"command": "\x1b[2J"},
            {"limits": {"other": 1}},
            {"weights": [{}]},
            {"predictions": {"text": 1}},
        )
        for damage in damages:
            (tmp_path / "bad.json").write_text(json.dumps(report | damage))
            done = program("ppx-verify", folder, "bad.json", cwd=tmp_path, status=2)
            assert "not a report" in done.stderr
            assert "\x1b" not in done.stderr

    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            ({"other": np.zeros((1, 17, 9), np.int32)}, "holds other"),
            ({"tokens": np.zeros((1, 17, 9), np.float32)}, "integers called tokens"),
            ({"tokens": np.zeros((1, 9, 17), np.int32)}, "integers called tokens"),
            ({"tokens": np.zeros((0, 17, 9), np.int32)}, "empty"),
            ({"tokens": np.full((1, 17, 9), 128, np.int32)}, "made for another one"),
            ({"tokens": np.full((1, 17, 9), -2, np.int64)}, "made for another one"),
        ],
    )
    def test_tokens_of_another_kind(self, tokens, words, bundle, pico, program, tmp_path):
        save_file(tokens, tmp_path / "tokens.safetensors")
        options = ("--reference", pico, "--tokens", "tokens.safetensors")
        done = program("ppx-verify", bundle(*SWIFT), *options, cwd=tmp_path, status=2)
        assert words in done.stderr

    def test_audio_with_a_codec_that_is_none(self, bundle, pico, program, tmp_path):
        with wave.open(str(tmp_path / "short.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(np.zeros(16000, np.int16).tobytes())
        options = ("--reference", pico, "--audio", "short.wav")
        done = program("ppx-verify", bundle(*SWIFT), *options, cwd=tmp_path, status=2)
        assert "not a codec that rustymimi loads" in done.stderr

    @pytest.mark.parametrize("options", [("--frames", "20"), ("--frames", "24"), ("--tokens", "silent.safetensors")])
    def test_material_that_tells_nothing_of_the_agent(self, options, bundle, pico, program, tmp_path):
        tokens = np.full((1, 17, 9), 5, np.int32)
        tokens[:, 1:9] = -1
        save_file({"tokens": tokens}, tmp_path / "silent.safetensors")
        done = program("ppx-verify", bundle(*SWIFT), "--reference", pico, *options, cwd=tmp_path, status=2)
        assert "have no predictions of some of the agent's codebooks: give more --frames" in done.stderr

    def test_options_that_contradict_each_other(self, bundle, pico, program, tmp_path):
        folder = bundle(*SWIFT)
        done = program("ppx-verify", folder, folder, "--reference", pico, cwd=tmp_path, status=2)
        assert "leave all options but --json out" in done.stderr
        done = program("ppx-verify", folder, "--tokens", "a", "--audio", "b", cwd=tmp_path, status=2)
        assert "contradict each other" in done.stderr


def test_a_report_of_strange_names_is_escaped(verified):
    report = left(verified(*SWIFT)[0])
    report["source"]["id"] = report["command"] = '<script>alert("x")</script>'
    report["weights"][0]["tensor"] = "<img src=x>"
    page = reports.html(Report.from_json(report))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_tokens_are_delayed_and_begin_with_initial_ones(pico):
    from ppx.convert.source.source import locate, open_source
    from ppx.model.tokens import read_tokens

    with open_source(locate(str(pico))) as source:
        a = source.architecture
    held = load_file(pico / "heldout_tokens.safetensors")["tokens"][:1, :, :20].astype(np.int32)
    token_set = read_tokens(pico / "heldout_tokens.safetensors", a, 1, 20)
    assert (token_set.tokens[0, :, 0] == [a.text_card] + [a.card] * 16).all()
    np.testing.assert_array_equal(token_set.tokens[0, :, 1:], token_set.targets[0, :, :-1])
    for stream, delay in enumerate(a.delays):
        np.testing.assert_array_equal(token_set.targets[0, stream, delay:], held[0, stream, : 20 - delay])
        assert token_set.counted[0, stream].tolist() == [False] * delay + [True] * (20 - delay)
