"""Sources of batches: who reads which samples."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch
from counting import Collectives
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import keras_tp
from keras_tp.collectives import Axis
from keras_tp.layouts import MeshShape
from keras_tp.mesh import torch_mesh
from keras_tp.rows import Rows
from keras_tp.seam.data import hook_data, unhook_data
from keras_tp.sources import already_shared_out, rows_from_process, share_out, sharing_rows
from keras_tp.training import share_random_state


def batch_axis(size: int = 2, model: int = 1) -> Axis:
    mesh = keras_tp.device_mesh({"batch": size, "model": model})
    return Axis.of(torch_mesh(MeshShape.from_keras(mesh)), "batch")


def on_one_rank() -> Axis:
    return Axis("batch", "no group", (0, 1), 0)


class Recorded(Dataset):
    """Sample i is (i, -i); remembers which samples it was asked for."""

    def __init__(self, size: int, wide: bool = False):
        self.size, self.wide = size, wide
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(index)
        width = index + 1 if self.wide else 2
        return np.full(width, float(index), "float32"), np.array([-index])


def read(loader: Any) -> list[tuple[list[float], list[int]]]:
    """For each batch its local samples, checked, and the counts."""
    found = []
    for x, y in loader:
        assert isinstance(x, torch.Tensor)
        local_x, local_y = (x.local_rows, y.local_rows) if isinstance(x, Rows) else (x, y)
        assert torch.equal(local_x[:, 0].long(), -local_y[:, 0])
        found.append((local_x[:, 0].long().tolist(), list(getattr(x, "counts", ()))))
    return found


def share_an_epoch(model: int, size: int, batch_size: int, options: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    share_random_state()
    axis = batch_axis(model=model)
    dataset = Recorded(size)
    loader = DataLoader(dataset, batch_size, **options)
    shared = share_out(loader, axis)
    assert isinstance(shared, DataLoader)
    assert len(shared) == len(loader)
    assert (shared.batch_size, shared.drop_last) == (loader.batch_size, loader.drop_last)
    with Collectives() as counts:
        epochs = [read(shared), read(shared)]
    return axis.rank, epochs, dataset.asked, dict(counts), torch.rand(1).item()


@pytest.mark.parametrize("model", [1, 2])
def test_every_sample_is_read_by_one_replica(ranks: Any, model: int) -> None:
    """Samples read twice or never make an epoch of other data than one process's.

    Seen to fail with the cut of the next replica, and with replicas counted over
    the model axis (the ranks of a replica then read different samples).
    """
    torch.manual_seed(3)
    loader = DataLoader(Recorded(23), 5, shuffle=True)
    expected = [[x[:, 0].long().tolist() for x, _ in loader] for _ in range(2)]
    drawn = torch.rand(1).item()
    told = ranks(2 * model)(share_an_epoch, model, 23, 5, {"shuffle": True})
    assert expected[0] != expected[1]
    for epoch in range(2):
        parts = {replica: epochs[epoch] for replica, epochs, *_ in told}
        for replica, epochs, *_ in told:
            assert epochs[epoch] == parts[replica]  # identical within a replica
        batches = [a[0] + b[0] for a, b in zip(parts[0], parts[1], strict=True)]
        assert batches == expected[epoch]
        assert [counts for _, counts in parts[0]] == [[3, 2]] * 4 + [[2, 1]]
    for _, epochs, asked, collectives, random_number in told:
        assert asked == [i for epoch in epochs for local, _ in epoch for i in local]
        # The 1st, 2nd, 4th and 8th of ten batches are compared.
        assert collectives == {"all_reduce": 4, "all_gather": 4}
        assert random_number == drawn  # what comes after draws as in one process


def short_batches() -> Any:
    axis = batch_axis(size=4)
    asked = []
    for size, options in ((9, {}), (3, {}), (9, {"drop_last": True})):
        dataset = Recorded(size)
        loader = share_out(DataLoader(dataset, 6, **options), axis)
        asked.append((read(loader), dataset.asked))
    return asked


def test_batches_of_fewer_samples_than_replicas_are_read_by_all(ranks: Any) -> None:
    """A replica without samples has nothing to compute on, and the collate_fn nothing to stack.

    Seen to fail with the cut of `chunk_bounds`.
    """
    told = ranks(4)(short_batches)
    cut = [[0, 1], [2, 3], [4], [5]]
    for rank, (ragged, few, dropped) in enumerate(told):
        assert ragged == (
            [(cut[rank], [2, 2, 1, 1]), ([6, 7, 8], [])],
            [*cut[rank], 6, 7, 8],
        )
        assert few == ([([0, 1, 2], [])], [0, 1, 2])
        assert dropped == ([(cut[rank], [2, 2, 1, 1])], cut[rank])


class Doubling(DataLoader):
    """A loader with an `__iter__` of its own."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for x, y in super().__iter__():
            yield x * 2, y * 2


def collate(samples: Any) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return {"a": x, "none": None}, y.numpy()


def options_kept() -> None:
    axis = batch_axis()
    dataset = Recorded(7)
    worker = share_out(
        DataLoader(
            dataset,
            4,
            num_workers=1,
            prefetch_factor=3,
            persistent_workers=True,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(2),
            shuffle=True,
            multiprocessing_context="fork",
            timeout=60,
        ),
        axis,
    )
    kept = worker.num_workers, worker.prefetch_factor, worker.persistent_workers, worker.timeout
    assert kept == (1, 3, True, 60)
    for _ in range(2):
        batches = list(worker)
        assert [x["a"].counts for x, _ in batches] == [(2, 2), (2, 1)]
        assert [x["none"] for x, _ in batches] == [None, None]
        found = sorted(int(-row) for _, y in batches for row in y.whole()[:, 0])
        assert found == list(range(7))
        for x, y in batches:
            assert torch.equal(x["a"].whole()[:, 0], -y.whole()[:, 0].float())
    assert dataset.asked == []  # the worker reads
    assert share_out(worker, axis) is worker
    batches = list(share_out(Doubling(dataset, 4), axis))
    assert batches[1][0].whole()[:, 0].tolist() == [8.0, 10.0, 12.0]
    # One iterator given up before it has read is no trouble for the next.
    loader = share_out(DataLoader(dataset, 4), axis)
    iter(loader)
    first, second = iter(loader), iter(loader)
    assert next(second)[0].whole()[:, 0].tolist() == next(first)[0].whole()[:, 0].tolist()
    alone = next(iter(share_out(DataLoader(TensorDataset(torch.arange(4)), 4), axis)))
    assert isinstance(alone, list)
    assert alone[0].tolist() == [0, 1, 2, 3]


def test_a_shared_loader_keeps_its_options(ranks: Any) -> None:
    """A loader rebuilt from a list of known options loses the others, and a subclass its ways.

    Seen to fail with a plain DataLoader of data set and batch sampler in its place.
    """
    ranks(2)(options_kept)


class Augmented(Dataset):
    """Samples that draw random numbers."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([torch.rand(1).item(), np.random.rand(), random.random()])


def augmented(workers: int) -> Any:
    axis = batch_axis(model=2)
    keras.utils.set_random_seed(0)
    plain = torch.Generator().manual_seed(1)
    loader = share_out(DataLoader(Augmented(), 5, num_workers=workers, generator=plain), axis)
    epochs = [[x.local_rows.tolist() for x in loader] for _ in range(2)]
    return epochs, (torch.rand(1).item(), np.random.rand(), random.random())


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_draw_random_numbers_do_not_part_the_replicas(
    ranks: Any, workers: int
) -> None:
    """Replicas that read different numbers of samples would then drop out and shuffle differently.

    And equal streams would augment the samples of all replicas in one way.
    Seen to fail without RandomStream, and without SeededWorker.
    """
    told = ranks(4)(augmented, workers)
    assert told[0] == told[1]
    assert told[2] == told[3]
    keras.utils.set_random_seed(0)
    state = torch.rand(1).item(), np.random.rand(), random.random()
    assert [after for _, after in told] == [state] * 4
    epochs = told[0][0], told[2][0]
    drawn = {tuple(row) for replica in epochs for (local,) in replica for row in local}
    assert len(drawn) == 10  # five samples, two epochs, all different


def message(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        function(*args, **kwargs)
    return str(caught.value)


def differing() -> list[str]:
    axis = batch_axis(model=2)
    rank = torch.distributed.get_rank()
    plain = torch.Generator().manual_seed(rank // 2)
    clocked = DataLoader(Recorded(9), 4, shuffle=True, generator=plain)
    longer = DataLoader(Recorded(9 + 4 * (rank == 3)), 4)
    ragged = DataLoader(Recorded(9, wide=True), 4, collate_fn=padded)
    other = DataLoader(TensorDataset(torch.full((8, 1), rank // 3)), 4)
    dropping = DataLoader(Recorded(9), 4, collate_fn=lambda samples: collate(samples[:1]))
    loaders = clocked, longer, ragged, other, dropping
    return [message(list, share_out(loader, axis)) for loader in loaders]


def padded(samples: Any) -> torch.Tensor:
    """As wide as the widest sample of the batch."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x, _ in samples], batch_first=True)


def test_ranks_that_read_different_data_are_an_error_on_all(ranks: Any) -> None:
    """Rows of different batches side by side would train in silence, or hang at the end.

    Seen to fail with each of the compared lines left out, and without the
    comparison of a replica's ranks.
    """
    told = ranks(4)(differing)
    assert told == [told[0]] * 4
    clocked, longer, ragged, other, dropping = told[0]
    assert "different data: rank 0 has samples [" in clocked
    assert "where rank 2 has samples [" in clocked
    assert "seed the generator you pass" in clocked
    assert "rank 0 has 3 batches where rank 3 has 4 batches" in longer
    assert "rank 0 has rows of float32 (2,) where rank 2 has rows of float32 (4,)" in ragged
    assert "pad samples to one shape" in ragged
    assert "ranks 2 and 3 compute the same rows of a batch (replica 1) and read different" in other
    assert "made 1 rows of 2 samples" in dropping


def test_samplers_that_share_out_are_refused() -> None:
    """A DistributedSampler's samples shared out again are half an epoch.

    Seen to fail without `check_sampler`.
    """
    dataset = TensorDataset(torch.arange(8))
    sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=0)
    batched: Any = torch.utils.data.BatchSampler(sampler, 2, False)
    for loader in (
        DataLoader(dataset, 2, sampler=sampler),
        DataLoader(dataset, batch_sampler=batched),
    ):
        for axis in (on_one_rank(), None):
            with pytest.raises(keras_tp.LayoutError, match=r"(?s)twice.*plain.*auto_shard_dataset"):
                share_out(loader, axis)
    alone: Any = DistributedSampler(dataset, num_replicas=1, rank=0)
    loader = DataLoader(dataset, sampler=alone)
    assert share_out(loader, None) is loader


class Numbers(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Batches(keras.utils.PyDataset):
    """Three batches."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return np.full((4, 2), float(index)), np.full((4, 1), float(index))


def test_other_sources_pass() -> None:
    """What cannot be read in part is read whole, by every rank the same."""
    for source in (
        *(np.zeros((4, 2)), torch.zeros(4), {"a": np.zeros(3)}, Batches()),
        *((i for i in range(3)), DataLoader(Numbers(), 2), DataLoader(TensorDataset(), None)),
    ):
        assert share_out(source, on_one_rank()) is source
    loader = DataLoader(TensorDataset(torch.arange(8)), 2)
    assert share_out(loader, None) is loader
    assert share_out(loader, Axis("batch", "no group", (0,), 0)) is loader


def uneven() -> Any:
    axis = batch_axis(model=2)
    start, sizes = (0, (3, 1)) if axis.rank == 0 else (10, (1, 2))
    parts = [(np.arange(start, start + n)[:, None], None) for n in sizes]
    shared = already_shared_out(parts, axis, 2)
    assert len(shared) == 2
    with Collectives() as counts:
        batches = list(shared)
    assert counts == {"all_gather": 3 + 2}  # each batch and the end; a replica's ranks, twice
    assert [x.counts for x, _ in batches] == [(3, 1), (1, 2)]
    assert len(list(shared)) == 2
    one = rows_from_process({"x": np.full((1 + axis.rank,), axis.rank)}, axis)["x"]
    assert one.counts == (1, 2)
    alone = Axis("batch", "no group", (0,), 0)
    assert already_shared_out(parts, alone) is parts
    assert rows_from_process(parts, alone) is parts
    return [x.whole()[:, 0].tolist() for x, _ in batches], one.tolist()


def test_parts_of_any_size_make_whole_batches(ranks: Any) -> None:
    """Replicas whose files hold different numbers of samples have batches of different sizes.

    Seen to fail with equal counts taken for granted.
    """
    assert ranks(4)(uneven) == [([[0, 1, 2, 10], [0, 10, 11]], [0, 1, 1])] * 4


def fails_second() -> Iterator[Any]:
    yield np.zeros((2, 1), "float32")
    raise OSError("no such file")


def disagreeing() -> list[str]:
    axis = batch_axis(model=2)
    rank, second = torch.distributed.get_rank(), axis.rank == 1
    rows = np.zeros((2, 1), "float32")
    ended = [rows] if second else [rows, rows]
    last = rank == 3

    def failure(batches: Any, length: int | None = None) -> str:
        try:
            list(already_shared_out(batches, axis, length))
        except (ValueError, OSError) as error:
            return str(error)
        raise AssertionError("no error")

    return [
        failure(ended),
        failure(ended, len(ended)),
        failure(fails_second() if last else [rows, rows]),
        failure([np.zeros((2, 3), "float32") if second else rows]),
        failure([rows[:0] if second else rows]),
        failure([rows[:1] if last else rows]),
        failure([rows + 1 if last else rows]),
        failure(["text" if last else rows]),
        message(rows_from_process, np.zeros((2, 1, 1 + second)), axis),
    ]


def test_parts_that_do_not_fit_are_an_error_on_all_ranks(ranks: Any) -> None:
    """A replica that ends early leaves the others waiting for it, until torch's timeout.

    Seen to fail (hang) without the exchange of what the ranks have, and with
    each of what it compares left out.
    """
    told = ranks(4)(disagreeing)
    own = {2: "no such file", 7: "a batch whose rows are shared out has a str in it"}
    for rank, messages in enumerate(told):
        for i, text in enumerate(messages):
            if rank == 3 and i in own:
                assert own[i] in text
            else:
                assert text == told[0][i] or i in (3, 8), (rank, i, text)
    ended, shorter, failed, wider, empty, uneven_ranks, other, text, process = told[0]
    assert "batch 2 of data" in ended
    assert "replica 1 (rank 2) has none, after 1, where replica 0 (rank 0) has" in ended
    assert "batch 1 of data" in shorter
    assert "rank 0 has 2 batches, rank 2 (replica 1) 1. Give every replica as many" in shorter
    assert "batch 2 of data" in failed
    assert "rank 3 (replica 1) failed to read it" in failed
    assert "rank 2 (replica 1) has rows of other shapes" in wider
    assert "rank 2 (replica 1) has no rows in it" in empty
    assert "rank 3 has 1 rows where another rank of replica 1 has 2" in uneven_ranks
    assert "ranks 2 and 3 compute the same rows of a batch (replica 1)" in other
    assert "rank 3 (replica 1) failed to read it" in text
    assert "rows of other shapes" in process


class Processes:
    """A distribution of several processes, as Keras's data path sees it."""

    _is_multi_process = True
    auto_shard_dataset = True

    def get_tensor_layout(self, path: str) -> None:
        return None

    def get_variable_layout(self, variable: Any) -> None:
        return None


def regression(jit_compile: bool = False) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"], weighted_metrics=["mse"], jit_compile=jit_compile)
    return model


SAMPLES = torch.linspace(0, 1, 22).reshape(11, 2)
TABLE = TensorDataset(SAMPLES, SAMPLES.sum(1, keepdim=True), torch.arange(11) / 11)


def fitted(sampler: bool = False, rank: int = 0) -> Any:
    model = regression()
    options: dict[str, Any] = {"shuffle": True}
    if sampler:
        options = {"sampler": DistributedSampler(TABLE, 2, rank, shuffle=False)}
    validation = DataLoader(TABLE, 3, **({**options} if sampler else {}))
    history = model.fit(
        DataLoader(TABLE, 4, **options),
        epochs=2,
        verbose=0,
        shuffle=False,
        validation_data=validation,
    ).history
    return history, model.predict(DataLoader(TensorDataset(SAMPLES), 4), verbose=0).tolist()


def fitted_on_ranks() -> Any:
    axis = batch_axis()
    seen: list[Any] = []
    original = keras.Sequential.__call__
    with sharing_rows(axis), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            keras.Sequential,
            "__call__",
            lambda self, x, **k: (seen.append(x), original(self, x, **k))[1],
        )
        keras.distribution.set_distribution(Processes())
        try:
            told = fitted()
            assert isinstance(keras.distribution.distribution(), Processes)
        finally:
            keras.distribution.set_distribution(None)
    # 11 samples: 2 epochs of 3 batches, 2 of 4 to validate, 3 to predict.
    given = [type(x) for x in seen if not isinstance(x, keras.KerasTensor) and not x.is_meta]
    assert given == [Rows] * 17
    unhook_data()
    return told


def test_fit_evaluate_and_predict_share_out(ranks: Any) -> None:
    """Data that come by another way than `fit`'s own (to validate, to predict) must be shared, too.

    To the digit: each rank computes the loss of the whole batch. Seen to fail
    with Keras's own `get_data_adapter` (which refuses the loaders).
    """
    expected = fitted()
    for told in ranks(2)(fitted_on_ranks):
        assert told == expected


def compiled_on_ranks() -> Any:
    torch.compiler.reset()
    model = regression(jit_compile=True)
    with warnings.catch_warnings(), sharing_rows(batch_axis()):
        warnings.simplefilter("ignore")  # torch's compiler has some of its own
        history = model.fit(DataLoader(TABLE, 4), epochs=2, verbose=0, shuffle=False).history
    unhook_data()
    return history


@pytest.mark.slow
def test_compiled_steps_take_rows(ranks: Any) -> None:
    """torch's compiler has to break its graph where rows are gathered, and go on with them."""
    expected = regression().fit(DataLoader(TABLE, 4), epochs=2, verbose=0, shuffle=False).history
    for history in ranks(2)(compiled_on_ranks, timeout=300):
        for name, values in history.items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-6)


def per_replica() -> Any:
    axis = batch_axis()
    half = slice(0, 6) if axis.rank == 0 else slice(6, 11)
    x, y, weight = (tensor[half] for tensor in TABLE.tensors)
    with sharing_rows(axis, already_shared=True):
        model = regression()
        arrays = model.fit(x.numpy(), y.numpy(), batch_size=3, epochs=2, verbose=0, shuffle=False)
        evaluated = model.evaluate(Whole(half), verbose=0)
        predicted = model.predict(x.numpy(), batch_size=6, verbose=0)
        weighted = model.evaluate(
            x.numpy(), y.numpy(), sample_weight=weight.numpy(), batch_size=6, verbose=0
        )
        short = slice(0, 6) if axis.rank == 0 else slice(6, 9)
        ended = message(model.fit, SAMPLES[short], SAMPLES[short], batch_size=3, verbose=0)
        sampled = fitted(sampler=True, rank=axis.rank)
    unhook_data()
    return arrays.history, evaluated, predicted.tolist(), weighted, sampled, ended


class Whole(keras.utils.PyDataset):
    """One batch."""

    def __init__(self, rows: slice):
        super().__init__()
        self.rows = rows

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[self.rows].numpy() for tensor in TABLE.tensors)


def test_data_shared_out_already_are_put_together(ranks: Any) -> None:
    """`auto_shard_dataset=False` with arrays, of which each rank holds others.

    Seen to fail with each replica's batches taken for whole ones.
    """
    model = regression()
    x, y, weight = (tensor.numpy() for tensor in TABLE.tensors)
    order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10]  # the first halves of both, then the second
    arrays = model.fit(x[order], y[order], batch_size=6, epochs=2, verbose=0, shuffle=False)
    evaluated = model.evaluate(x, y, sample_weight=weight, batch_size=11, verbose=0)
    predicted = model.predict(x, verbose=0)
    for told in ranks(2)(per_replica):
        assert told[0] == arrays.history
        assert told[1] == told[3] == evaluated
        np.testing.assert_allclose(told[2], predicted, rtol=1e-6)
        assert set(told[4][0]) >= {"loss", "val_loss"}
        assert "rank 0 has 2 batches, rank 1 (replica 1) 1" in told[5]


def test_without_sharing_keras_does_as_ever() -> None:
    """A hook that stays in force would change models that are not parallelized."""
    from keras.src.trainers import data_adapters

    original = data_adapters.get_data_adapter
    hook_data()
    hook_data()
    model = regression()
    try:
        keras.distribution.set_distribution(Processes())
        x = np.zeros((4, 2)), np.zeros((4, 1))
        with pytest.raises(ValueError, match="multi-worker distribution"):
            model.evaluate(*x, verbose=0)
        with sharing_rows(None):
            model.evaluate(*x, verbose=0)
    finally:
        keras.distribution.set_distribution(None)
        unhook_data()
    assert data_adapters.get_data_adapter is original
    unhook_data()


def generated() -> Any:
    axis = batch_axis()
    model = regression()
    with sharing_rows(axis), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, at the end of a generator
        found = [
            model.evaluate(((x, y) for x, y in Batches()), verbose=0, steps=3),
            model.evaluate(Batches(), verbose=0),
            model.evaluate(DataLoader(IterableBatches(), None), verbose=0),
        ]
    unhook_data()
    return found


class IterableBatches(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        for i in range(3):
            yield tuple(torch.tensor(array, dtype=torch.float32) for array in Batches()[i])


def test_sources_of_whole_batches_are_read_whole(ranks: Any) -> None:
    """Batches of a generator that are cut twice, or dropped, have other losses."""
    model = regression()
    expected = model.evaluate(Batches(), verbose=0)
    for told in ranks(2)(generated):
        assert told == [expected] * 3
