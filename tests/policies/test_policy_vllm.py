"""vLLM's file: what is written, that vLLM's own reading rules give the table back, and what is refused by version.

`parsed` below restates, from the packages named in servecast.policies.vllm, how each version turns the file into
arguments and how its parser takes them.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from policy_documents import HOSTILE, table

from servecast.policies import vllm
from servecast.policies.versions import parse_version

VERSIONS = (
    "0.6.0",
    "0.6.3",
    "0.6.4",
    "0.6.5",
    "0.7.3",
    "0.8.0",
    "0.8.4",
    "0.8.5",
    "0.9.0.1",
    "0.10.0",
    "0.20.2",
    "0.32.0",
)


class Refusing(argparse.ArgumentParser):
    """A parser that raises instead of leaving the process."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def word(text: str) -> bool:
    """StoreBoolean of the early versions: True or False, any case."""
    return {"true": True, "false": False}[text.lower()]


def parser_of(version: str) -> argparse.ArgumentParser:
    """`vllm serve` of this version, as far as the policy table goes."""
    numbers = parse_version(version)
    parser = Refusing(allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model")
    for name in ("dtype", "quantization", "kv-cache-dtype"):
        parser.add_argument(f"--{name}")
    for name in ("tensor-parallel-size", "pipeline-parallel-size", "max-num-seqs", "max-num-batched-tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    if numbers < (0, 6, 5, 0):
        parser.add_argument("--enable-prefix-caching", action="store_true")
    else:
        parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    if numbers < (0, 8, 5, 0):
        parser.add_argument("--enable-chunked-prefill", type=word, nargs="?", const=True)
    else:
        parser.add_argument("--enable-chunked-prefill", action=argparse.BooleanOptionalAction)
    if numbers >= (0, 10, 0, 0):
        parser.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction)
    return parser


def words_of_file(version: str, text: str) -> list[str]:
    """The file as arguments."""
    words = []
    for key, value in yaml.safe_load(text).items():
        if parse_version(version) < (0, 6, 4, 0):
            words += [f"--{key}", str(value)]
        elif isinstance(value, bool):
            words += [f"--{key}"] if value else []  # false is lost
        else:
            words += [f"--{key}", str(value)]
    return words


def parsed(version: str, command: list[str], text: str) -> dict[str, Any]:
    """What the engine understands of the launch command and the file it names."""
    assert command[:2] == ["vllm", "serve"]
    index = command.index("--config")
    config, rest = words_of_file(version, text), command[2:index] + command[index + 2 :]
    # 0.6.0 puts the file's arguments before the model, later versions behind it.
    words = config + rest if parse_version(version) < (0, 6, 3, 0) else [rest[0], *config, *rest[1:]]
    return vars(parser_of(version).parse_args(words))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_engine_reads_the_table_back(version: str, chunked: bool, caching: bool) -> None:
    wanted = table(
        engine_version=version,
        max_num_batched_tokens=32768,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=caching,
        precision="fp8",
        kv_format="fp8",
        tp=4,
        pp=2,
    )
    read = parsed(version, vllm.launch_command(wanted), vllm.serve_config(wanted))
    assert read["model_tag"] == read["model"] == wanted.model
    assert read["tensor_parallel_size"] == 4
    assert read["pipeline_parallel_size"] == 2
    assert read["max_num_seqs"] == wanted.max_num_seqs
    assert read["max_num_batched_tokens"] == wanted.max_num_batched_tokens
    assert read["max_model_len"] == wanted.max_model_len
    assert read["gpu_memory_utilization"] == wanted.gpu_memory_utilization
    assert (read["dtype"], read["quantization"], read["kv_cache_dtype"]) == ("auto", "fp8", "fp8")
    assert read["enable_chunked_prefill"] is chunked
    assert read["enable_prefix_caching"] is caching


def test_yaml_says_what_was_intended() -> None:
    """Hand: every option of the table, in vLLM's names."""
    assert yaml.safe_load(vllm.serve_config(table(enable_prefix_caching=False))) == {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "dtype": "bfloat16",
        "kv-cache-dtype": "auto",
        "tensor-parallel-size": 2,
        "pipeline-parallel-size": 1,
        "max-num-seqs": 128,
        "max-num-batched-tokens": 8192,
        "max-model-len": 16384,
        "gpu-memory-utilization": 0.9,
        "enable-chunked-prefill": True,
        "no-enable-prefix-caching": True,
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_data(name: str) -> None:
    wanted = table(model=name, gpu=name, provenance=table().provenance.model_dump() | {"trace": name, "profile": name})
    text = vllm.serve_config(wanted)
    assert yaml.safe_load(text) == vllm.options(wanted)
    assert yaml.safe_load(text)["model"] == name
    body = [line for line in text.splitlines() if not line.startswith("# ")]
    assert len(body) == len(vllm.options(wanted))
    assert parsed("0.32.0", vllm.launch_command(wanted), text)["model_tag"] == name
    assert shlex.split(shlex.join(vllm.launch_command(wanted)))[2] == name


@pytest.mark.parametrize(
    ("option", "version", "span"),
    [
        ("max_num_partial_prefills", "0.5.0", "since 0.7.3, until 0.27.0"),
        ("max-num-partial-prefills", "0.32.0", "since 0.7.3, until 0.27.0"),
        ("async-scheduling", "0.9.2", "since 0.10.0"),
        ("num_scheduler_steps", "0.11.0", "since 0.6.0, until 0.11.0"),
    ],
)
def test_option_a_version_does_not_know(option: str, version: str, span: str) -> None:
    with pytest.raises(ValueError, match=rf"^vllm {version} does not know {option} \({span}\)$"):
        vllm.ENGINE.require(option, version)


def test_extra_options_follow_the_version() -> None:
    assert vllm.options(table(), {"async_scheduling": False})["no-async-scheduling"] is True
    assert vllm.options(table(), {"async-scheduling": True})["async-scheduling"] is True
    with pytest.raises(ValueError, match=r"^vllm 0\.9\.2 does not know async-scheduling \(since 0\.10\.0\)$"):
        vllm.options(table(engine_version="0.9.2"), {"async-scheduling": True})
    with pytest.raises(ValueError, match=r"^vllm option async-scheduling must be true or false, got 1$"):
        vllm.options(table(), {"async-scheduling": 1})
    with pytest.raises(ValueError, match=r"^vllm option block-size must be a value, not a switch, got True$"):
        vllm.options(table(), {"block-size": True})
    with pytest.raises(ValueError, match="no option 'trust-remote-code'"):
        vllm.options(table(), {"trust-remote-code": True})


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.5.5", "vllm 0.5.5 is older than 0.6.0, the oldest version known"),
        ("0.33.0", "vllm 0.33.0 is newer than 0.32.0, the newest version known"),
        ("1.0", "vllm 1.0 is newer than 0.32.0, the newest version known"),
    ],
)
def test_versions_outside_the_table(version: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        vllm.serve_config(table(engine_version=version))


def test_later_patch_of_the_newest_minor_is_accepted() -> None:
    newest, patch = table(engine_version="0.32.0"), table(engine_version="0.32.7")
    assert vllm.options(newest) == vllm.options(patch)


@pytest.mark.parametrize(
    ("precision", "published", "expected"),
    [
        ("bf16", None, {"dtype": "bfloat16"}),
        ("bf16", "fp16", {"dtype": "bfloat16"}),
        ("fp16", "fp16", {"dtype": "float16"}),
        ("fp8", "bf16", {"dtype": "auto", "quantization": "fp8"}),
        ("fp8", None, {"dtype": "auto", "quantization": "fp8"}),
        ("fp8", "fp8", {"dtype": "auto"}),
        ("int4", "int4", {"dtype": "auto"}),
        ("int4", None, {"dtype": "auto"}),
        ("mxfp4", "mxfp4", {"dtype": "auto"}),
    ],
)
def test_weights(precision: str, published: str | None, expected: dict[str, str]) -> None:
    written = vllm.options(table(precision=precision, checkpoint_format=published))
    assert {key: written[key] for key in ("dtype", "quantization") if key in written} == expected


@pytest.mark.parametrize(("precision", "published"), [("int4", "bf16"), ("bf16", "fp8"), ("fp8", "int4")])
def test_conversions_that_no_loader_does(precision: str, published: str) -> None:
    with pytest.raises(ValueError, match=r"^vllm cannot [^\n]+$"):
        vllm.serve_config(table(precision=precision, checkpoint_format=published))


def test_kv_format_by_version() -> None:
    assert vllm.options(table(kv_format="nvfp4", engine_version="0.20.0"))["kv-cache-dtype"] == "nvfp4"
    with pytest.raises(ValueError, match=r"^vllm 0\.19\.0 does not know kv-cache-dtype nvfp4 \(since 0\.20\.0\)$"):
        vllm.serve_config(table(kv_format="nvfp4", engine_version="0.19.0"))
    with pytest.raises(ValueError, match=r"^vllm kv_format must be one of bf16, fp16, fp8, nvfp4, got int4$"):
        vllm.serve_config(table(kv_format="int4"))


def test_batch_rules_of_the_scheduler() -> None:
    with pytest.raises(ValueError, match=r"^vllm max_num_batched_tokens must be >= max_num_seqs 128, got 64$"):
        vllm.serve_config(table(max_num_batched_tokens=64))
    with pytest.raises(ValueError, match=r"must be >= max_model_len 16384 without chunked prefill, got 8192$"):
        vllm.serve_config(table(enable_chunked_prefill=False))


def test_other_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^engine must be vllm, got sglang$"):
        vllm.serve_config(table(engine="sglang", engine_version="0.5.1"))


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # the engine and its libraries warn about themselves on import
def test_vllm_itself_reads_the_file(tmp_path: Path) -> None:
    """Independent code: the parser of the installed vLLM."""
    engine = pytest.importorskip("vllm")
    arguments = pytest.importorskip("vllm.engine.arg_utils")
    parsers = pytest.importorskip("vllm.utils.argparse_utils")
    version = ".".join(engine.__version__.split("+")[0].split(".")[:3])
    wanted = table(engine_version=version, enable_prefix_caching=False)
    file = tmp_path / vllm.CONFIG_FILE
    file.write_text(vllm.serve_config(wanted), encoding="utf-8")
    top = parsers.FlexibleArgumentParser()
    serve = top.add_subparsers(dest="command").add_parser("serve")
    serve.add_argument("model_tag", nargs="?")
    serve.add_argument("--config")
    arguments.AsyncEngineArgs.add_cli_args(serve)
    read = top.parse_args(vllm.launch_command(wanted, str(file))[1:])
    assert read.model_tag == wanted.model
    assert read.tensor_parallel_size == wanted.tp
    assert read.max_num_seqs == wanted.max_num_seqs
    assert read.max_num_batched_tokens == wanted.max_num_batched_tokens
    assert read.max_model_len == wanted.max_model_len
    assert read.gpu_memory_utilization == pytest.approx(wanted.gpu_memory_utilization, rel=1e-12)
    assert read.enable_chunked_prefill is True
    assert read.enable_prefix_caching is False
