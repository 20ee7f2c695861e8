"""Rows and batches: the same whatever the number of ranks, resumable, and documents kept apart."""

import json

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_lora_dist.data import load_documents, micro_batches, pack, packed_batch
from sparse_lora_dist.data.batches import best_fit
from tests.fixtures.tiny_tokenizer import byte_tokenizer

LENGTH = 20
PAD = byte_tokenizer().pad_token_id


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "a.jsonl"
    sizes = np.random.default_rng(0).integers(1, LENGTH - 2, 60)
    records = [{"prompt": chr(65 + i % 26), "response": "r" * int(n)} for i, n in enumerate(sizes)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        return load_documents(
            str(path),
            byte_tokenizer(),
            text_field="text",
            prompt_field="prompt",
            response_field="response",
            chat_template=None,
            train_on="response",
            sequence_length=LENGTH,
            max_samples=None,
        )


def packed(documents, **options):
    return pack(documents, **{"sequence_length": LENGTH, "packing": True, "seed": 1, **options})


def batches(rows, **options):
    defaults = {
        "first_row": 0,
        "end_row": 10**9,
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 2,
        "accumulation": 1,
        "pad_id": PAD,
        "collate": packed_batch,
    }
    return micro_batches(rows, **{**defaults, **options})


def layout(rows):
    return [rows.document_numbers(i) for i in range(len(rows))]


def test_packing_uses_each_document_once_and_fills_rows_well(documents):
    rows = packed(documents)
    numbers = [n for row in layout(rows) for n in row]
    assert sorted(numbers) == list(range(len(documents)))
    assert len(rows) < 0.75 * len(documents)
    for i, members in enumerate(layout(rows)):
        row = rows[i]
        sizes = [int(documents.lengths[n]) for n in members]
        assert len(row.input_ids) == sum(sizes) <= LENGTH
        assert row.position_ids.tolist() == [p for size in sizes for p in range(size)]
        assert (row.labels[row.position_ids == 0] == -100).all()


def test_the_rows_depend_on_data_and_seed_only(documents):
    assert layout(packed(documents)) == layout(packed(documents))
    assert layout(packed(documents)) != layout(packed(documents, seed=2))
    plain = packed(documents, packing=False)
    assert layout(plain) == [[i] for i in range(len(documents))]


def test_best_fit_takes_the_fullest_row_with_room():
    assert best_fit(np.array([6, 7, 3, 2, 2, 10]), 10).tolist() == [0, 1, 1, 0, 0, 2]


def test_best_fit_is_not_quadratic():
    lengths = np.random.default_rng(0).integers(1, 2048, 200_000)
    fill = np.bincount(best_fit(lengths, 2048), weights=lengths)  # quadratic code takes hours
    assert fill.max() <= 2048
    assert fill.mean() > 0.97 * 2048


def test_each_epoch_is_its_own_permutation_of_all_rows(documents):
    rows = packed(documents)
    n = len(rows)
    epochs = [[rows.index(e * n + i, shuffle=True) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [rows.index(n + i, shuffle=False) for i in range(n)] == list(range(n))


def test_the_stream_has_no_memory(documents):
    rows, fresh = packed(documents), packed(documents)
    walked = [rows.index(i, shuffle=True) for i in range(3 * len(rows))]
    for i in (2 * len(rows) + 5, 3, len(rows)):  # a resumed run starts anywhere
        assert fresh.index(i, shuffle=True) == walked[i]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(documents, world_size):
    rows, total, micro = packed(documents), 12, 1
    parts = [
        batches(
            rows,
            first_row=30,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
            accumulation=total // world_size,
        )
        for rank in range(world_size)
    ]
    for i in range(total):
        batch = parts[i // micro % world_size][i // (world_size * micro)]
        row = rows[rows.index(30 + i, shuffle=True)]
        n = len(row.input_ids)
        assert batch.rows_M == (30 + i,)
        assert batch.input_ids_MT[0, :n].tolist() == row.input_ids.tolist()
        assert batch.labels_MT[0, :n].tolist() == row.labels.tolist()
        assert batch.position_ids_MT[0, :n].tolist() == row.position_ids.tolist()


def test_rows_go_to_micro_batch_and_rank_by_the_stated_rule(documents):
    options = {"world_size": 3, "micro_batch_size": 2, "accumulation": 2}
    got = [batches(packed(documents), rank=r, **options) for r in range(3)]
    assert [[b.rows_M for b in rank] for rank in got] == [
        [(0, 1), (6, 7)],
        [(2, 3), (8, 9)],
        [(4, 5), (10, 11)],
    ]


def test_the_last_partial_batch_is_filled_with_rows_that_teach_nothing(documents):
    rows = packed(documents)
    n = len(rows)
    first, second = batches(rows, first_row=n - 1, end_row=n, accumulation=2, shuffle=False)
    assert (first.rows_M, second.rows_M) == ((n - 1, -1), (-1, -1))
    assert first.num_targets == int((rows[n - 1].labels != -100).sum())
    assert second.num_targets == 0
    assert second.input_ids_MT.shape == (2, 8)
    assert (second.input_ids_MT == int(rows[0].input_ids[0])).all()  # an embedding that is not 0


def test_the_targets_of_an_epoch_are_all_targets(documents):
    for packing in (True, False):
        rows = packed(documents, packing=packing)
        counts = [
            batch.num_targets
            for first_row in range(0, len(rows), 8)
            for rank in range(4)
            for batch in batches(
                rows, first_row=first_row, end_row=len(rows), rank=rank, world_size=4
            )
        ]
        assert sum(counts) == documents.num_targets


def test_rows_are_padded_to_eights_but_not_past_the_sequence_length(documents):
    rows = packed(documents, packing=False)
    short = int(documents.lengths.argmin())
    (batch,) = batches(rows, first_row=short, micro_batch_size=1, shuffle=False)
    n = len(rows[short].input_ids)
    assert n < 8
    assert batch.input_ids_MT[0, n:].tolist() == [int(rows[short].input_ids[-1])] * (8 - n)
    assert batch.labels_MT[0, n:].tolist() == [-100] * (8 - n)
    assert batch.position_ids_MT[0].tolist() == [*range(n), *range(8 - n)]
    (wide,) = batches(rows, micro_batch_size=len(rows), shuffle=False)
    assert wide.input_ids_MT.shape == (len(rows), LENGTH)  # 20 is no multiple of 8


def test_a_batch_is_of_whole_numbers(documents):
    (batch,) = batches(packed(documents))
    for name in ("input_ids_MT", "labels_MT", "position_ids_MT"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).shape == batch.input_ids_MT.shape


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


def logits(model, ids_MT, positions_MT):
    with torch.no_grad():
        return model(input_ids=ids_MT, position_ids=positions_MT, use_cache=False).logits


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_no_document_sees_another_nor_the_padding(documents, model, packing, num_rows):
    rows = packed(documents, packing=packing)
    (batch,) = batches(rows, micro_batch_size=num_rows)
    ids_MT, positions_MT = batch.input_ids_MT, batch.position_ids_MT
    before = logits(model, ids_MT, positions_MT)
    # Every restart of the positions begins a document, the padding among them.
    starts = (positions_MT == 0).nonzero().tolist()
    for m, start in starts:
        rest = (positions_MT[m, start + 1 :] == 0).nonzero()
        end = start + 1 + int(rest[0]) if len(rest) else ids_MT.shape[1]
        changed_ids = ids_MT.clone()
        changed_ids[m, start:end] = (changed_ids[m, start:end] + 7) % 250
        after = logits(model, changed_ids, positions_MT)
        inside = torch.zeros_like(ids_MT, dtype=torch.bool)
        inside[m, start:end] = True
        torch.testing.assert_close(after[~inside], before[~inside], rtol=0, atol=1e-6)
        assert (after[inside] - before[inside]).abs().max() > 1e-3


def test_a_packed_document_has_the_logits_it_has_alone(documents, model):
    (batch,) = batches(packed(documents), micro_batch_size=3)
    together = logits(model, batch.input_ids_MT, batch.position_ids_MT)
    for m, number in enumerate(batch.rows_M):
        rows = packed(documents)
        start = 0
        for document in rows.document_numbers(rows.index(number, shuffle=True)):
            ids = torch.from_numpy(documents[document].input_ids)[None]
            alone = logits(model, ids, torch.arange(ids.shape[1])[None])
            got = together[m, start : start + ids.shape[1]]
            torch.testing.assert_close(got, alone[0], rtol=1e-5, atol=1e-5)
            start += ids.shape[1]
