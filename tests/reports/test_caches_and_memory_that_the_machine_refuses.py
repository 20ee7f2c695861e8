"""A home that cannot be written, a limit on memory: the message names the cache or the limit, and
what to set, whichever library meets it first."""

import errno
from pathlib import Path

import pytest

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.data import read_files
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.runtime import entry_point
from sparse_lora_dist.runtime.entry_point import USER_ERROR, run_program
from sparse_lora_dist.system.machine_errors import in_plain_words

LIMITS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("[/pytorch/third_party/gloo/x.cc:1] mmap: Cannot allocate memory"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that even root cannot write: it lies in a file."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "home"
    monkeypatch.setenv("HOME", str(path))
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.mark.parametrize(
    ("below", "folder", "wanted"),
    [
        (".cache", ".cache/huggingface/datasets", "Set HF_HOME (HF_DATASETS_CACHE for this cache"),
        (".cache/huggingface/hub/x", ".cache/huggingface/hub", "Set HF_HOME (HF_HUB_CACHE for"),
        (".triton/cache/a", ".triton", "Set TRITON_CACHE_DIR to a folder"),
        (".cache/torch_extensions/py", ".cache/torch_extensions", "Set TORCH_EXTENSIONS_DIR to"),
        (".config/matplotlib", ".config/matplotlib", "Set MPLCONFIGDIR to a folder"),
    ],
)
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    home: Path, below: str, folder: str, wanted: str
) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", str(home / below))
    said = in_plain_words(error)
    assert said is not None
    assert said.startswith(f"The cache {home / folder} cannot be used: Permission denied: ")
    assert wanted in said


def test_a_file_in_the_place_of_a_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", "a_file")
    said = in_plain_words(FileExistsError(errno.EEXIST, "File exists", "a_file"))
    assert said is not None
    assert said.startswith(f"The cache {tmp_path / 'a_file'} cannot be used: File exists")


def test_the_variables_that_the_user_has_set_are_looked_at(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", "/elsewhere/sets")
    error = OSError(errno.EROFS, "Read-only file system", "/elsewhere/sets/sparse_lora_dist")
    said = in_plain_words(error)
    assert said is not None and "The cache /elsewhere/sets cannot be used" in said


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/data/mine.jsonl"),
        FileNotFoundError(
            errno.ENOENT, "No such file", "HOME/.cache/huggingface/hub/x/config.json"
        ),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/none"),
        OSError(errno.EIO, "Input/output error", "/data/mine.jsonl"),
        RuntimeError("size mismatch"),
        ValueError("x"),
    ],
)
def test_other_errors_keep_their_own_words(home: Path, error: Exception) -> None:
    if isinstance(error, OSError):
        error.filename = error.filename.replace("HOME", str(home))
    assert in_plain_words(error) is None


def test_data_that_can_be_read_are_not_blamed_for_the_cache(home: Path, tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(home / ".cache"))
    with pytest.raises(UserError) as error, read_files.readable("--data x.jsonl"):
        raise RuntimeError("a library's own words") from denied
    assert str(error.value).startswith("The cache ") and "HF_HOME" in str(error.value)
    assert "--data" not in str(error.value)
    with pytest.raises(UserError, match="^The cache .* Set HF_HOME"), fail_together("reading"):
        raise denied


def test_no_folder_for_temporary_files() -> None:
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    said = in_plain_words(error)
    assert said is not None and "Set TMPDIR to a folder" in said


@pytest.mark.parametrize("error", LIMITS, ids=lambda error: type(error).__name__)
def test_a_limit_on_memory_is_one_sentence_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Ended(BaseException):
        pass

    def ends(code: int) -> None:
        raise Ended(code)

    def work(config: object) -> None:
        raise error

    monkeypatch.setattr(entry_point, "exit_process", ends)
    monkeypatch.setattr(entry_point, "quiet_others", lambda: None)
    with pytest.raises(Ended) as ended:
        run_program([], load_config, work)
    assert ended.value.args == (USER_ERROR,)
    said = capfd.readouterr().err
    assert said.startswith("error: this process gets no more memory (")
    assert "ulimit -v" in said and "launcher/plan.py" in said and "Traceback" not in said
