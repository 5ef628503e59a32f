"""vila-edge pull against a small hub on loopback: what is fetched, what is refused, what an interruption leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.hub_server import BIG, COMMIT, OLD, Hub, released, serve
from vila_edge.cli import main
from vila_edge.errors import UsageError
from vila_edge.export.hub import parse_id

WANTED = sorted(n for n in released() if not n.endswith((".py", ".bin")) and not n.startswith("."))
SHARDS = {f"llm/model-0000{i}-of-00002.safetensors": None for i in (1, 2)}
AWQ = released(**SHARDS, **{"llm/vila-w4-g128-awq-v2.pt": b"tensors"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process and its children use, and nothing else of the network."""
    made = Hub()
    server = serve(made)
    home = tmp_path / "hf-home"
    settings = {
        "HF_ENDPOINT": made.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    constants = huggingface_hub.constants  # read from the environment when it was imported
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    template = made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield made
    huggingface_hub.close_session()
    made.go_on.set()
    server.shutdown()
    server.server_close()


@dataclass
class Done:
    code: int
    stderr: str


Pull = Callable[..., Done]


@pytest.fixture
def pull(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pull:
    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["vila-edge", "pull", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return Done(left.value.code, err)

    return run


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_weights_configs_tokenizer_and_licence_come_and_nothing_else(hub: Hub, pull: Pull) -> None:
    done = pull("o/VILA")
    assert done.code == 0, done.stderr
    assert os.listdir() == ["VILA"]
    assert files_of(Path("VILA")) == sorted([*WANTED, "vila-edge-source.json"])
    assert all(Path("VILA", name).read_bytes() == hub.files[name] for name in WANTED)
    assert not any(path.is_symlink() for path in Path("VILA").rglob("*"))
    assert hub.fetched() == WANTED
    assert not [path for _, path, _ in hub.asked if path.endswith((".py", ".bin"))]
    source = json.loads(Path("VILA/vila-edge-source.json").read_text())
    assert source == {"repo": "o/VILA", "revision": COMMIT, "license": "cc-by-nc-4.0"}
    assert f"o/VILA at commit {COMMIT}: {len(WANTED)} files, 204.9 kB" in done.stderr
    assert "licence, by its model card: cc-by-nc-4.0\n" in done.stderr
    assert "is not the licence of the weights" in done.stderr
    assert done.stderr.endswith("export VILA -o VILA.bundle\n")


@pytest.mark.parametrize(
    ("card", "license", "said"),
    [
        ({}, "unknown", "card: unknown\n"),
        ({"license": "other"}, "other", "card: other\n"),
        (
            {"license": "other", "license_name": "nv\x1b[31m", "license_link": "https://x/y"},
            "nv?[31m",
            "card: nv?[31m (https://x/y)\n",
        ),
        ({"license": ["mit", "llama3"]}, "mit, llama3", "card: mit, llama3\n"),
    ],
)
def test_the_licence_is_told_and_kept(hub: Hub, pull: Pull, card: dict[str, Any], license: str, said: str) -> None:
    hub.card, hub.files = card, {"config.json": b"{}", "model.safetensors": b"x"}
    assert said in pull("o/VILA", "-o", "a").stderr
    assert json.loads(Path("a/vila-edge-source.json").read_text())["license"] == license


def test_a_revision_is_resolved_once(hub: Hub, pull: Pull) -> None:
    done = pull("o/VILA@v1/old", "-o", "deep/er/old")
    assert f"at commit {OLD}" in done.stderr
    assert json.loads(Path("deep/er/old/vila-edge-source.json").read_text())["revision"] == OLD
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path and OLD not in path]


def test_torch_weights_need_a_word(hub: Hub, pull: Pull) -> None:
    hub.files = AWQ
    done = pull("o/VILA")
    assert done.code == 3
    assert "weights of llm are not there as *.safetensors, only as llm/vila-w4-g128-awq-v2.pt" in done.stderr
    assert "hint: --torch-files fetches such files too; they are read without being unpickled" in done.stderr
    assert hub.fetched() == os.listdir() == []
    assert pull("o/VILA", "--torch-files").code == 0
    assert Path("VILA/llm/vila-w4-g128-awq-v2.pt").read_bytes() == b"tensors"
    assert not Path("VILA/training_args.bin").exists()


def test_the_same_weights_do_not_come_twice_nor_does_the_state_of_a_trainer(hub: Hub, pull: Pull) -> None:
    state = {
        "optimizer.pt": b"x",
        "llm/pytorch_model.bin": b"x",
        "a/mp_rank_00_model_states.pt": b"x",
        "VT-smooth-scale.pt": b"x",
    }
    hub.files = released(**state)
    assert pull("o/VILA", "--torch-files").code == 0
    assert hub.fetched() == WANTED


V10 = {"config.json": b'{"mm_vision_tower": "openai/clip"}', "pytorch_model.bin": b"x", "vocab.pkl": b"x"}


def test_a_v10_checkpoint_names_its_tower(hub: Hub, pull: Pull) -> None:
    hub.files = V10
    assert "the weights of the model are not there" in pull("o/VILA").stderr
    done = pull("o/VILA", "--torch-files")
    assert "its vision tower is another repository:" in done.stderr
    assert "pull openai/clip -o clip --torch-files" in done.stderr
    assert hub.fetched() == ["config.json", "pytorch_model.bin"]


BAD_CALLS = {
    "no organisation": (["VILA"], 2, "'VILA' is not a repository on the hub, expected ORG/NAME"),
    "an address": (["https://huggingface.co/o/VILA"], 2, "is not a repository on the hub"),
    "no revision": (["o/VILA@"], 2, "after @ is not a revision"),
    "revision": (["o/VILA@../x"], 2, "after @ is not a revision"),
    "no place": (["o/VILA", "-o", "."], 2, "-o .: expected the name of a folder"),
    "unknown repository": (["o/none"], 3, "/o/none: no such model repository, or it is private"),
    "unknown revision": (["o/VILA@v9"], 3, "o/VILA has no branch, tag or commit 'v9'"),
    "not a hub": (["o/odd"], 3, "/o/odd: not the answer of a Hugging Face hub"),
    "broken hub": (["o/broken"], 1, "/o/broken: the hub answered 500"),
    "unwritable": (["o/VILA", "-o", "/proc/nothing/x"], 1, "cannot write /proc/nothing"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_error_and_leaves_nothing(case: str, hub: Hub, pull: Pull) -> None:
    arguments, code, message = BAD_CALLS[case]
    done = pull(*arguments)
    assert done.code == code
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert os.listdir() == []


EVIL = ["../x.json", "a/../../x.json", "/etc/x.json", "..\\x.json", "C:/x.json", "a//x.json", "a/./b.json", "a\n.json"]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_that_leads_elsewhere_is_refused(name: str, hub: Hub, pull: Pull, tmp_path: Path) -> None:
    hub.files[name] = b"x"
    done = pull("o/VILA")
    assert done.code == 3
    assert "may lead out of its folder; nothing was fetched" in done.stderr
    assert hub.fetched() == os.listdir() == []


def test_what_is_no_checkpoint_is_refused(hub: Hub, pull: Pull) -> None:
    hub.files = {"data.json": b"{}"}
    assert "no config.json at its root" in pull("o/VILA").stderr
    hub.files = {"config.json": b"{}", "model.gguf": b"x"}
    done = pull("o/VILA", "--torch-files")
    assert (done.code, "no weights: found neither *.safetensors nor" in done.stderr) == (3, True)
    assert hub.fetched() == []


def test_a_gated_repository_is_told_before_anything_is_fetched(hub: Hub, pull: Pull) -> None:
    hub.gated = "auto"
    done = pull("o/VILA")
    assert done.code == 3
    assert "o/VILA is gated" in done.stderr
    assert f"hint: agree at {hub.endpoint}/o/VILA, then log in" in done.stderr
    assert hub.fetched() == os.listdir() == []


def test_a_token_is_used_and_never_shown(hub: Hub, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fails = {"llm/tokenizer.model"}
    done = pull("o/VILA")
    assert (done.code, "the hub answered 403" in done.stderr) == (1, True)
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stderr


def test_too_little_space_is_told_before_anything_is_fetched(hub: Hub, pull: Pull) -> None:
    hub.sizes = {"vision_tower/model.safetensors": 10**18}
    done = pull("o/VILA")
    assert done.code == 1
    assert "1,000,000,000.00 GB to fetch" in done.stderr
    assert hub.fetched() == os.listdir() == []


def test_a_disk_that_fills_up_is_told_and_what_is_complete_stays(
    hub: Hub, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = huggingface_hub.hf_hub_download

    def full(repo: str, name: str, **options: Any) -> str:
        if name.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return fetch(repo, name, **options)

    monkeypatch.setattr("vila_edge.export.hub_fetch.hf_hub_download", full)
    done = pull("o/VILA")
    assert (done.code, "No space left on device\nhint: free some space" in done.stderr) == (1, True)
    assert os.listdir() == [".VILA.partial"]


def test_only_a_checkpoint_is_replaced_and_only_by_force(hub: Hub, pull: Pull) -> None:
    assert pull("o/VILA").code == 0
    hub.asked.clear()
    done = pull("o/VILA")
    assert (done.code, "VILA exists already" in done.stderr) == (2, True)
    assert hub.asked == []
    hub.files["config.json"] = b'{"new": 1}'
    assert pull("o/VILA", "--force").code == 0
    assert Path("VILA/config.json").read_bytes() == b'{"new": 1}'
    Path("home").mkdir()
    Path("home/letter").write_text("dear")
    done = pull("o/VILA", "-o", "home", "--force")
    assert (done.code, "home is not a checkpoint" in done.stderr) == (2, True)
    assert os.listdir("home") == ["letter"]


def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", len(BIG) // 4)  # what it keeps is whole ones
    shard = "llm/model-00001-of-00002.safetensors"
    hub.breaks = {shard}
    assert pull("o/VILA").code == 0
    assert ("GET", f"/o/VILA/resolve/{COMMIT}/{shard}", f"bytes={len(BIG) // 2}-") in hub.asked
    assert Path("VILA", shard).read_bytes() == BIG


@pytest.mark.parametrize("name", ["llm/tokenizer.model", "llm/model-00002-of-00002.safetensors"])
def test_other_content_than_listed_is_refused(name: str, hub: Hub, pull: Pull) -> None:
    hub.sent = {name: hub.files[name][:-1] + b"!"}
    done = pull("o/VILA")
    assert done.code == 3
    assert f"{name} came with other content than the hub lists" in done.stderr
    assert os.listdir() == [".VILA.partial"]
    hub.sent, before = {}, hub.fetched()
    assert pull("o/VILA").code == 0
    assert hub.fetched().count(name) == 2
    assert hub.fetched().count(before[0]) == 1
    assert os.listdir() == ["VILA"]


def test_what_another_revision_left_half_way_does_not_get_in(hub: Hub, pull: Pull) -> None:
    hub.files["llm/added.json"] = b"{}"
    hub.sent = {"vision_tower/model.safetensors": b"TOWER"}
    assert pull("o/VILA@v1/old").code == 3
    assert Path(".VILA.partial/llm/added.json").exists()
    hub.files, hub.sent = released(**{"llm/config.json": b"{ }"}), {}
    assert pull("o/VILA").code == 0
    assert files_of(Path("VILA")) == sorted([*WANTED, "vila-edge-source.json"])
    assert Path("VILA/llm/config.json").read_bytes() == b"{ }"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vila_edge", "pull", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        # A background job inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_stops_at_once_and_the_next_pull_goes_on(hub: Hub, pull: Pull) -> None:
    shard = "llm/model-00002-of-00002.safetensors"
    hub.stalls = {shard}
    child = start("o/VILA")
    assert hub.stalled.wait(20)
    second = pull("o/VILA")
    assert (second.code, "another pull is filling it" in second.stderr) == (2, True)
    child.send_signal(signal.SIGINT)
    try:
        _, err = child.communicate(timeout=60)  # the shard would stall for ever
    finally:
        child.kill()
    assert child.returncode == 130
    assert "stopped; .VILA.partial keeps what is complete" in err
    assert "Traceback" not in err
    assert os.listdir() == [".VILA.partial"]
    first = hub.fetched()
    hub.stalls, hub.asked = set(), []
    assert pull("o/VILA").code == 0
    assert hub.fetched() == sorted({*WANTED} - {*first} | {shard})
    assert files_of(Path("VILA")) == sorted([*WANTED, "vila-edge-source.json"])


def test_without_a_network_the_cache_is_used_or_the_lack_of_it_told(hub: Hub, pull: Pull, tmp_path: Path) -> None:
    hub.card = {"license": "x"}
    hub.files["README.md"] = b"---\nlicense: cc-by-nc-sa-4.0\n---\nwords"
    offline = start("o/VILA", HF_HUB_OFFLINE="1")
    nowhere = start("o/VILA", HF_ENDPOINT="http://127.0.0.1:9")
    assert "HF_HUB_OFFLINE is set, and o/VILA is not in the cache" in offline.communicate(timeout=20)[1]
    assert "http://127.0.0.1:9/o/VILA cannot be reached" in nowhere.communicate(timeout=20)[1]
    assert (offline.returncode, nowhere.returncode) == (1, 1)
    for name in WANTED:
        huggingface_hub.hf_hub_download("o/VILA", name)
    hub.asked.clear()
    cached = start("o/VILA", HF_HUB_OFFLINE="1")
    err = cached.communicate(timeout=20)[1]
    assert cached.returncode == 0, err
    assert "the files come from the cache" in err
    assert hub.asked == []
    assert files_of(Path("VILA")) == sorted([*WANTED, "vila-edge-source.json"])
    assert not any(path.is_symlink() for path in Path("VILA").rglob("*"))
    source = json.loads(Path("VILA/vila-edge-source.json").read_text())
    assert source == {"repo": "o/VILA", "revision": COMMIT, "license": "cc-by-nc-sa-4.0"}


def test_ids() -> None:
    assert parse_id("Efficient-Large-Model/VILA1.5-3b") == ("Efficient-Large-Model/VILA1.5-3b", None)
    assert parse_id("o/n@refs/pr/1") == ("o/n", "refs/pr/1")
    for text in (
        "",
        "/",
        "o/",
        "/n",
        "o/n/m",
        "o/../n",
        "o--p/n",
        "o/n.git",
        "o/n-",
        "-o/n",
        "ö/n",
        "o/n@-x",
        "o/n@a b",
    ):
        with pytest.raises(UsageError):
            parse_id(text)
