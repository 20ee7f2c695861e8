"""Wrong networks: every rank ends within seconds, and the message names what to set."""

import errno
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.distributed.launch_mpi import _remedy
from sparse_lora_dist.distributed.meeting_place import listening_socket
from sparse_lora_dist.errors import UserError
from tests.distributed.test_launchers import REPOSITORY, free_port
from tests.tiers import in_full


def launched(address: str, local_size: int = 2) -> Launch:
    port = int(free_port())
    return Launch(launcher="srun", world_size=2, local_size=local_size, address=address, port=port)


def test_a_rank_whose_network_fails_ends_the_others_too(processes: None, tmp_path: Path) -> None:
    """gloo finds no address for one rank, and the other would wait for it for minutes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    usual = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    screen = tmp_path / "screen"
    with screen.open("w") as file:
        ranks = [
            subprocess.Popen(
                [sys.executable, "tests/work/joining.py"],
                cwd=REPOSITORY,
                env={**usual, **place, "RANK": rank, "LOCAL_RANK": rank} | network,
                stdout=file,
                stderr=file,
            )
            for rank, network in (("0", {}), ("1", {"GLOO_SOCKET_IFNAME": "nosuch0"}))
        ]
    assert [rank.wait(timeout=200) for rank in ranks] == [2, 2]
    said = screen.read_text()
    host = socket.gethostname()
    assert said.count(f"error: rank 1 on {host} cannot connect to the other ranks: ") == 1, said
    assert f"On {host} GLOO_SOCKET_IFNAME is nosuch0." in said
    assert "set GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME too" in said
    assert "Traceback" not in said and "connected" not in said


def test_a_run_of_one_rank_names_a_network_that_is_not_there(processes: None) -> None:
    env = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "nosuch0"}
    command = [sys.executable, "tests/work/joining.py"]
    end = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert end.returncode == 2 and "GLOO_SOCKET_IFNAME is nosuch0." in end.stderr
    assert "Traceback" not in end.stderr


def test_the_ranks_of_one_machine_meet_where_no_other_machine_gets() -> None:
    for address in ("127.0.0.1", "localhost"):
        listener = listening_socket(launched(address))
        assert listener is not None and listener.getsockname()[0] == "127.0.0.1"
        listener.close()


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("localhost", "a name may have other addresses on other machines"),
        ("127.0.0.1", "others would not reach it"),
        ("192.0.2.1", "it is the address of no interface here, as behind a router"),
    ],
)
def test_over_several_machines_all_interfaces_listen_where_one_may_not_do(
    address: str, why: str
) -> None:
    assert listening_socket(launched(address, local_size=1)) is None, why


def test_a_port_that_is_taken_is_not_passed_over() -> None:
    launch = launched("127.0.0.1")
    with socket.create_server(("127.0.0.1", launch.port or 0)):
        with pytest.raises(OSError) as caught:
            listening_socket(launch)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_name_that_no_server_knows_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"MASTER_ADDR=n9 is not known on .* Set MASTER_ADDR to"):
        launched("n9").check_address()
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    "command",
    [
        ["launcher/train.py"],
        in_full(["launcher/eval.py", "--eval_data", "assets/gsm8k/heldout.jsonl"]),
    ],
)
def test_it_is_refused_before_large_libraries_are_imported(
    command: list[str], processes: None, tmp_path: Path
) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise AssertionError('it was imported')")
    place = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500", "PYTHONPATH": tmp_path}
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={name: str(value) for name, value in (place | rank).items()},
        capture_output=True,
        text=True,
    )
    assert ended.stderr.startswith("error: MASTER_ADDR=no-such-host.invalid is not known on ")
    assert ended.returncode == 2


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PMI_SIZE": "2"}, ("MPICH or Intel MPI", "MPI4PY_MPIABI=mpich", "libmpi.so.12")),
        ({"PMI_SIZE": "2"}, ("MPICC=mpicc.mpich pip install --force-reinstall --no-binary",)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("Open MPI", "MPI4PY_MPIABI=openmpi", "libmpi.so.40")),
    ],
)
def test_an_mpi_that_is_not_that_of_mpirun_is_mended_by_mpiruns_own_compiler(
    environ: dict[str, str], words: tuple[str, ...]
) -> None:
    """`pip install --no-binary mpi4py` alone takes the mpicc in PATH, which built the wrong one."""
    assert all(word in _remedy(environ) for word in words)
