"""What the kernels' walks take for their bytes, counted in machine code: ``bench/walks.py``."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process, and compiles nothing", allow_module_level=True)

from bench import walks


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    return walks.measure("sm_90")


@pytest.fixture(scope="module")
def measured(entries: list[dict]) -> dict[str, list[dict]]:
    return {entry["name"]: entry["walks"] for entry in entries}


def test_every_walk_keeps_up_with_the_memory_of_an_h200(measured: dict[str, list[dict]]) -> None:
    gives = walks.memory_bytes_per_clock("H200")
    assert list(measured) == [name for name, _ in walks.SHOWN]
    late = {name: found for name, found in measured.items() if min(w["bytes_per_clock"] for w in found) < gives}
    assert not late, late


def test_the_loss_walks_as_often_as_its_kernel_says(measured: dict[str, list[dict]]) -> None:
    """Two walks where G is known, else three; and the gradient, half as wide as a logit, is written in the last."""
    moved = {name: [walk["moved"] for walk in found] for name, found in measured.items()}
    one_of_each, gradient = 2 * 16 * 32, 8 * 32
    assert moved["kd_loss, forward_kl"] == [one_of_each, one_of_each + gradient]
    assert moved["kd_loss, reverse_kl"] == [one_of_each, one_of_each + gradient]
    assert moved["kd_loss, jsd"] == [one_of_each, one_of_each, one_of_each + gradient]
    assert moved["kd_loss, top-k teacher"] == [one_of_each // 2, one_of_each // 2 + gradient]


def test_no_walk_of_the_loss_moves_data_between_lanes(measured: dict[str, list[dict]]) -> None:
    """A sum over four neighbours must stay within a lane, and a gradient must lie as its logits do."""
    for name, found in measured.items():
        assert not name.startswith("kd_loss") or all(w["shared"] == w["shuffles"] == 0 for w in found), name


def test_all_loads_of_a_round_are_under_way_before_the_first_is_waited_for(entries: list[dict]) -> None:
    """Else a walk over two models waits for the memory twice a round."""
    between = {entry["name"]: entry["between_loads"] for entry in entries}
    assert max(between.values()) <= 16, between


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FMNMX R8, R8, R4, !PT ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.RCP R9, R9 ;
        /*0050*/                   MUFU.RCP R9, R9 ;
        /*0060*/                   MUFU.RCP R9, R9 ;
.L_x_2:
        /*0070*/                   MUFU.EX2 R9, R4 ;
        /*0080*/                   SHFL.BFLY PT, R9, R9, 0x1, 0x1f ;
        /*0090*/                   STS [R7], R9 ;
        /*00a0*/                   STG.E.64 desc[UR4][R6.64], R8 ;
        /*00b0*/               @P0 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
"""


def test_counts_a_round_of_a_loop_without_what_it_may_jump_over(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(stdout=LISTING)
    monkeypatch.setattr(walks.subprocess, "run", lambda *args, **kwargs: done)
    (walk,) = walks.walks(SimpleNamespace(asm={"cubin": b""}))
    assert walk == walks.Walk(
        instructions=8, half_rate=1, special=1, shuffles=1, shared=1, moved=32 * (16 + 8), between_loads=0
    )
    assert walk.clocks == 8 and walk.bytes_per_clock == 4 * 768 / 8

    without_loop = LISTING.replace("@P0 BRA `(.L_x_1)", "NOP").replace("BRA `(.L_x_3)", "NOP")
    done.stdout = without_loop
    (walk,) = walks.walks(SimpleNamespace(asm={"cubin": b""}))
    assert walk.instructions == 10  # from the first to EXIT
