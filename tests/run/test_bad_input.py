"""Whatever is wrong with what the user gave: exit code 1, a message that names it and what to do, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from halfbin.cli.app import app
from halfbin.formats import safetensors as ours
from halfbin.run import job
from models import zoo
from run.small_models import write_tokenizer

MARK = "a stranger's code ran"


def copy_of(name: str, folder: Path, *, sharded: bool = False) -> Path:
    return Path(shutil.copytree(zoo.directory_of(name, shard="20KB" if sharded else None), folder / "model"))


def first_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(folder: Path, words: list[str], *options: object, out: str = "out") -> None:
    """`halfbin quantize model -o out` fails as promised, and all files stay as they were."""
    before = contents(folder)
    result = run("quantize", folder / "model", "-o", folder / out, "--no-evaluate", *options)
    assert result.exit_code == 1, result.output
    said = " ".join(result.stderr.split())
    assert [word for word in words if word not in said] == [], said
    assert "Traceback" not in said
    assert contents(folder) == before
    assert result.stdout == ""


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the JSON of a safetensors file, leaving its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    first, second = header[names[0]], header[names[1]]
    second["data_offsets"] = first["data_offsets"]
    second["shape"] = first["shape"]


def grow(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] *= 1000


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "overlap": (overlap, "overlap"),
    "a shape larger than its bytes": (grow, "bytes"),
    "a hole": (
        lambda h: h[list(h)[-1]].update(data_offsets=[h[list(h)[-1]]["data_offsets"][0] + 4] * 2, shape=[0]),
        "hole",
    ),
    "an unknown type": (lambda h: next(v for k, v in h.items() if k != "__metadata__").update(dtype="Q9"), "Q9"),
    "offsets beyond the file": (
        lambda h: next(v for k, v in h.items() if k != "__metadata__").update(data_offsets=[0, 2**60]),
        "bytes",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path)
    change, word = HEADERS[case]
    change_header(first_shard(model), change)
    assert_refused(tmp_path, ["model.safetensors", word])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", ["0 bytes", "download or copy it again"], id="empty"),
        pytest.param((10**12).to_bytes(8, "little") + b"{}", ["1000000000000 bytes"], id="huge header"),
        pytest.param(
            (99 * 10**6).to_bytes(8, "little") + b"{}", ["99000000 bytes", "the file has 10"], id="cut header"
        ),
        pytest.param((2).to_bytes(8, "little") + b"[]", ["JSON object"], id="no object"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", ["safetensors"], id="a pointer of git-lfs"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, words: list[str], tmp_path: Path) -> None:
    first_shard(copy_of("llama", tmp_path)).write_bytes(content)
    assert_refused(tmp_path, ["model.safetensors", *words])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path, sharded=True)
    missing = first_shard(model)
    missing.unlink()
    assert_refused(tmp_path, [missing.name, "index"])


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path, sharded=True)
    cut = first_shard(model)
    os.truncate(cut, cut.stat().st_size - 10)
    assert_refused(tmp_path, [cut.name, "download or copy it again"])


@pytest.mark.parametrize("target", ["not-there.safetensors", "../outside.safetensors", "/etc/passwd"])
def test_an_index_that_points_elsewhere_is_refused(target: str, tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path, sharded=True)
    shutil.copy(first_shard(model), tmp_path / "outside.safetensors")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(content))
    assert_refused(tmp_path, ["index", target])


class Attack:
    """Unpickling this runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"raise SystemExit({MARK!r})",))


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path)
    first_shard(model).unlink()
    torch.save({"model.norm.weight": torch.ones(32), "x": Attack()}, model / "pytorch_model.bin")
    assert_refused(tmp_path, ["pytorch_model.bin"])
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    assert_refused(tmp_path, ["pytorch_model.bin", "safetensors"])


def test_a_pickle_of_weights_alone_is_read_without_running_anything(tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path)
    torch.save(load_file(first_shard(model)), model / "pytorch_model.bin")
    first_shard(model).unlink()
    result = run("quantize", model, "-o", tmp_path / "out", "--no-evaluate", "--recipe", "int8")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param('[[rule]]\nmatch = "*"\nweigths = "int4"\n', ["weigths", "weights"], id="unknown key"),
        pytest.param('[[rule]]\nmatch = "*"\nweights = "int4-g12x"\n', ["int4-g12x"], id="unknown scheme"),
        pytest.param('[[rule]]\nmatch = "*"\nweights = "int4"\nmethod = "gtpq"\n', ["gtpq"], id="unknown method"),
        pytest.param('[[rule]\nmatch = "*"\n', ["TOML"], id="no TOML"),
        pytest.param('[[rule]]\nmatch = "*.q_prj"\nweights = "int4"\n', ["q_prj", "no site"], id="matches nothing"),
    ],
)
def test_a_recipe_that_is_not_understood_is_refused_with_the_key(text: str, words: list[str], tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    assert_refused(tmp_path, ["mine", *words], "--recipe", tmp_path / "mine.toml")


def test_a_recipe_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    assert_refused(tmp_path, ["int44", "int4"], "--recipe", "int44")


def test_a_full_directory_is_not_written_over(tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert_refused(tmp_path, ["out", "not empty", "--force"])
    assert_refused(tmp_path, ["not written by halfbin", "thesis.txt"], "--force")


@pytest.mark.parametrize("out", ["model", ".", "model/out", "/"])
def test_the_model_itself_is_not_written_over(out: str, tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    assert_refused(tmp_path, ["the model that is read", "choose"], "--force", out=out)


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_the_work(device: str, tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    assert_refused(tmp_path, [device, "cpu"], "--device", device)


def test_with_force_an_earlier_result_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of("llama", tmp_path)
    assert run("quantize", model, "-o", tmp_path / "out", "--no-evaluate", "--recipe", "int8").exit_code == 0
    with monkeypatch.context() as broken:
        broken.setattr(ours, "_write_all", full_disk)
        assert_refused(tmp_path, ["disk is full"], "--force", "--recipe", "int4")
    assert run("quantize", model, "-o", tmp_path / "out", "--no-evaluate", "--recipe", "fp8", "--force").exit_code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"] == "fp8"


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["_reserve", "_write_all"])
def test_a_full_disk_is_told_and_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of("llama", tmp_path)
    monkeypatch.setattr(ours, call, full_disk)
    assert_refused(tmp_path, ["disk is full", "bytes are needed", "choose another -o"])


def test_a_disk_that_is_full_after_the_weights_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of("llama", tmp_path)
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    assert_refused(tmp_path, ["is full", "nothing was left behind", "choose another -o"])


def test_a_file_that_the_system_will_not_let_grow_is_told(tmp_path: Path) -> None:
    copy_of("llama", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert_refused(tmp_path, ["model.safetensors", "cannot be written", "File too large", "bytes are needed"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy_of("llama", tmp_path)
    before = contents(tmp_path)
    open_file, read_bytes = os.open, Path.read_bytes

    # Permissions do not bind root, who may run this test; so the calls themselves refuse.
    def refusing_open(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path) == model / file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *arguments, **options)

    def refusing_read(path: Path) -> bytes:
        if path == model / file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing_open)
        patched.setattr(Path, "read_bytes", refusing_read)
        result = run("quantize", model, "-o", tmp_path / "out", "--no-evaluate")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1 and f"{model / file}" in said and "Permission denied; check its permissions" in said
    assert contents(tmp_path) == before


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["EvilModel"], "model_type": "evil"}
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"raise SystemExit({MARK!r})")
    assert_refused(tmp_path, ["evil.EvilConfig", "--trust-remote-code"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_tensor_and_position(value: float, tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path)
    weights = load_file(first_shard(model))
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][30, 5] = value
    save_file(weights, first_shard(model), {"format": "pt"})
    assert_refused(tmp_path, [name, "[30, 5]", str(value)])


def test_weights_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    model = copy_of("llama", tmp_path)
    weights = load_file(first_shard(model))
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, first_shard(model), {"format": "pt"})
    assert_refused(tmp_path, ["model.norm.weight", "1e+06", "bf16"], "--recipe", "fp16")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, ["words.txt"], id="missing"),
        pytest.param(b"\xff\xfe\x00bad", ["words.txt", "UTF-8"], id="no UTF-8"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_before_any_work(
    content: bytes | None, words: list[str], tmp_path: Path
) -> None:
    copy_of("llama", tmp_path)
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    assert_refused(tmp_path, words, "--text", tmp_path / "words.txt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda m: (m / "config.json").unlink(), ["config.json"], id="no config"),
        pytest.param(lambda m: (m / "config.json").write_text("{"), ["config.json", "JSON"], id="broken config"),
        pytest.param(lambda m: first_shard(m).unlink(), ["no weights"], id="no weights"),
        pytest.param(shutil.rmtree, ["model"], id="nothing there"),
    ],
)
def test_a_directory_that_is_no_model_is_told_apart(
    change: Callable[[Path], object], words: list[str], tmp_path: Path
) -> None:
    change(copy_of("llama", tmp_path))
    assert_refused(tmp_path, words)


UP = "model.layers.0.mlp.up_proj.weight"
FITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "missing": (lambda weights: weights.pop(UP), ["missing keys", UP]),
    "one too many": (
        lambda weights: weights.update({UP.replace("0", "7"): weights[UP].clone()}),
        ["unexpected keys", UP.replace("0", "7")],
    ),
    "another shape": (
        lambda weights: weights.update({UP: torch.zeros(64, 48)}),
        [f"{UP} is [64, 48] and should be [64, 32]"],
    ),
}


@pytest.mark.parametrize("layout", ["compressed-tensors", "halfbin", "safetensors"])
@pytest.mark.parametrize("case", FITS)
def test_weights_that_do_not_fill_the_model_are_named_before_the_work(
    case: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of("llama", tmp_path)
    weights = load_file(first_shard(model))
    change, words = FITS[case]
    change(weights)
    save_file(weights, first_shard(model), {"format": "pt"})
    monkeypatch.setattr(job, "execute", no_work)
    assert_refused(tmp_path, [str(model), *words, "config.json"], "--format", layout)
    assert run("quantize", model, "--dry-run").exit_code == 1


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


@pytest.mark.parametrize(
    ("name", "tokenizer", "text", "words"),
    [
        pytest.param("llama", True, "", ["text of 0 characters", "words.txt"], id="empty"),
        pytest.param("llama", False, "a", ["at least 2", "longer text", "words.txt"], id="one token"),
        pytest.param("llama", None, "some words", ["tokenizer", "--no-evaluate"], id="no tokenizer"),
        pytest.param("bert", True, "short\nlines\n", ["words.txt", "20 characters"], id="no sentence"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused_before_the_work(
    name: str, tokenizer: bool | None, text: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(name, tmp_path)
    if tokenizer is not None:
        write_tokenizer(model, bos=tokenizer)
    (tmp_path / "words.txt").write_text(text)
    monkeypatch.setattr(job, "execute", no_work)
    assert_refused(tmp_path, words, "--evaluate", "--text", tmp_path / "words.txt")


def test_a_tokenizer_of_another_model_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of("llama", tmp_path)
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 20}
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(first_shard(model))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:20].clone()
    save_file(weights, first_shard(model), {"format": "pt"})
    write_tokenizer(model)
    monkeypatch.setattr(job, "execute", no_work)
    assert_refused(tmp_path, ["knows 20 tokens only", "--no-evaluate"], "--evaluate")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param("llama", ["--no-evaluate"], ["--no-evaluate"], id="not measured"),
        pytest.param("bert", ["--evaluate"], ["BertModel predicts no tokens"], id="an encoder"),
        pytest.param("vit", ["--evaluate"], ["ViTForImageClassification needs more than a text"], id="pictures"),
    ],
)
def test_a_limit_that_nothing_can_be_held_against_is_refused(
    name: str, options: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(name, tmp_path)
    monkeypatch.setattr(job, "execute", no_work)
    assert_refused(tmp_path, ["--max-kl 0.1", *words], *options, "--max-kl", "0.1")


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    assert run("quantize", zoo.directory_of("llama"), "-o", tmp_path / "model", "--no-evaluate").exit_code == 0
    assert_refused(tmp_path, ["quantized already", "float model"])


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of("llama", tmp_path)
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path, ["cannot write to", "choose another -o"], out="file/out")
