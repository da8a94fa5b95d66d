"""Loaders: laws 4 and 5 (the stream of batches does not depend on hosts, interruptions or history), and accounting."""

import dataclasses
import functools
import itertools
import json
import time

import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.data.loader import DataConfig, Packing, Seen, build_loader, merge_states
from jaxlm.data.prompted import TemplateRate
from jaxlm.data.tasks import ExamplesRate, Mixture, text_task
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.objectives import mixture as objective_mixture
from jaxlm.objectives.codegen2 import CodeGen2
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.masked_lm import MaskedLM
from jaxlm.objectives.prefix_lm import PrefixLM
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.supervised import Eos, Supervised
from jaxlm.objectives.ul2 import UL2
from jaxlm.piecewise import Piecewise

VOCABULARY = ByteVocabulary()
LENGTHS = {"inputs": 48, "targets": 16}
CASES = {
    "concat": (Packing.CONCAT_AND_SPLIT, SpanCorruption(), Architecture.ENCODER_DECODER),
    "concat_masked": (Packing.CONCAT_AND_SPLIT, MaskedLM(), Architecture.ENCODER),
    "plan": (Packing.PLAN, SpanCorruption(), Architecture.PREFIX_DECODER),
    "plan_pairs": (Packing.PLAN, Supervised(), Architecture.ENCODER_DECODER),
    "none_pairs": (Packing.NONE, Supervised(), Architecture.PREFIX_DECODER),
    "stream": (Packing.FIRST_FIT, PrefixLM(), Architecture.PREFIX_DECODER),
    "stream_pairs": (Packing.FIRST_FIT, Supervised(), Architecture.ENCODER_DECODER),
}
SCHEDULE = Piecewise((0, 6), (1.0, 4.0))


@pytest.fixture(scope="module")
def data(make_text, make_pairs):
    def mixture(make, name):
        tasks = ((make(f"{name} {i}", seed=i), SCHEDULE if i else 1.0) for i in range(2))
        return Mixture(name, tuple(tasks))

    modes = make_text("modes")
    vocabulary = ByteVocabulary(extra_ids=40, named_tokens=("[R]", "[S]", "[X]"))
    modes = text_task("modes", modes.source, vocabulary)
    return {"text": mixture(make_text, "text"), "pairs": mixture(make_pairs, "pairs"), "modes": modes}


@pytest.fixture(params=CASES)
def build(request, data):
    """A function that builds the case's loader: (options of build_loader, changes of the config) -> loader."""
    packing, objective, architecture = CASES[request.param]
    config = DataConfig(
        mixture=data["pairs" if "pairs" in request.param else "text"],
        feature_lengths=LENGTHS,
        packing=packing,
        virtual_shards=4,
        look_ahead=16,
        plan_look_ahead=32,
    )

    def make(batch_size=8, split="train", changes=None, **options):
        changed = dataclasses.replace(config, **(changes or {}))
        return build_loader(
            changed, objective=objective, architecture=architecture, batch_size=batch_size, split=split, **options
        )

    return make


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(slices):
    slices = list(slices)
    return {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}


def share(batch_size, host, hosts):
    """Rows of a host, if the hosts share the batch out in order."""
    return range(host * batch_size // hosts, (host + 1) * batch_size // hosts)


def hosts_of(build, hosts, **options):
    return [build(rows=share(8, h, hosts), **options) for h in range(hosts)]


def test_batches_have_the_features_they_promise(build):
    loader = build(rows=share(8, 1, 2))
    for batch in take(loader, 2):
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == loader.features
        weights = batch.get("decoder_loss_weights", batch.get("encoder_loss_weights"))
        assert weights.any() and np.isfinite(weights).all()
        assert max(array.max() for array in batch.values()) < loader.vocabulary.size


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_same_batches(build, hosts):
    """Law 4: 1 -> 2 -> 4 hosts."""
    whole = take(build(), 6)
    slices = [take(loader, 6) for loader in hosts_of(build, hosts)]
    for k, batch in enumerate(whole):
        same(joined([one[k] for one in slices]), batch)


def test_a_host_reads_the_rows_that_its_devices_hold(build):
    """On a torus a host's devices may hold rows that are not next to each other, or that other hosts hold too."""
    whole = take(build(), 4)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7], [2, 3]):
        for batch, part in zip(whole, take(build(rows=rows), 4), strict=True):
            same(part, {name: x[rows] for name, x in batch.items()})


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 2), (1, 4), (4, 1)])
def test_a_run_resumes_exactly_on_any_number_of_hosts(build, before, after):
    """Law 4: what is saved by some hosts is gone on with by others; what was read ahead is not lost."""
    whole = take(build(), 7)
    loaders = hosts_of(build, before)
    for loader in loaders:
        take(loader, 3)
    state = json.loads(json.dumps(merge_states([loader.state() for loader in loaders])))
    resumed = hosts_of(build, after)
    for loader in resumed:
        next(loader)  # restoring also works in the middle of something else
        loader.restore(state)
        assert merge_states([loader.state()])["step"] == 3
    slices = [take(loader, 4) for loader in resumed]
    for k in range(4):
        same(joined([one[k] for one in slices]), whole[3 + k])


@pytest.mark.parametrize("saved_by", [1, 2])
def test_a_position_is_gone_on_with_for_an_earlier_step(build, saved_by):
    """A run that went back from step 5 to 2 reads what comes after 5, and its own positions are as good as any."""
    loaders = hosts_of(build, saved_by)
    for loader in loaders:
        take(loader, 5)
    later, loader = merge_states([loader.state() for loader in loaders]), build()
    take(loader, 2)
    before = loader.state()
    loader.restore(later, step=2)
    assert loader.state()["step"] == 2
    on = take(loader, 4)
    middle = build()
    middle.restore(later, step=2)
    take(middle, 2)
    resumed = build()
    resumed.restore(json.loads(json.dumps(middle.state())))
    for a, b in zip(take(resumed, 2), on[2:], strict=True):
        same(a, b)
    ids = loader.examples_at(later)
    assert ids and ids != loader.examples_at(before)
    # One more time back to the same step, as when the spike comes again.
    loader.restore(merge_states([loader.state()]), step=2)
    assert loader.state()["step"] == 2
    assert loader.examples_at(loader.state()) not in (ids, loader.examples_at(before))
    take(loader, 1)


def test_going_back_skips_exactly_the_batches_between(data):
    """Without rates that change with the step, the stream after step 5 is what it would have been."""
    mixture = data["text"].tasks_and_rates[0][0]
    whole = take(lm_loader(text_config(data, mixture=mixture)), 9)
    loader = lm_loader(text_config(data, mixture=mixture))
    take(loader, 5)
    loader.restore(loader.state(), step=2)
    for a, b in zip(take(loader, 4), whole[5:], strict=True):
        same(a, b)
    assert loader.state()["step"] == 6


def test_reading_ahead_changes_nothing(build):
    ahead = take(build(changes={"read_threads": 2, "prefetch_batches": 6}), 5)
    for a, b in zip(ahead, take(build(changes={"read_threads": 0}), 5)):
        same(a, b)


def test_seeds_and_epochs_give_other_batches(build):
    first, second = take(build(), 1)[0], take(build(changes={"seed": 1}), 1)[0]
    name = "decoder_target_tokens" if "decoder_target_tokens" in first else "encoder_input_tokens"
    assert (first[name] != second[name]).mean() > 0.3


def test_one_pass_ends_and_can_be_taken_again_on_any_number_of_hosts(build):
    loader = build(split="validation")
    batches = list(loader)
    assert len(batches) == loader.num_batches > 1
    for batch, again in zip(batches, list(loader), strict=True):
        same(batch, again)
    slices = [list(one) for one in hosts_of(build, 4, split="validation")]
    for k, batch in enumerate(batches):
        same(joined([one[k] for one in slices]), batch)
    # Used rows come first; empty ones only fill the last batch.
    rows = joined(batches)
    used = rows[next(name for name in rows if name.endswith("_segment_ids"))].any(1)
    assert used[: used.sum()].all() and (~used).sum() < 8


def test_a_small_state(build):
    loader = build()
    next(loader)
    assert len(json.dumps(loader.state())) <= 1024
    loader.close()


def test_positions_of_other_data_are_refused(build):
    state = build().state()
    with pytest.raises(ValueError, match="a run with seed 0 instead of 1"):
        build(changes={"seed": 1}).restore(state)
    with pytest.raises(ValueError, match="a run with other files, row lengths or reading options"):
        build(changes={"shuffle": False}).restore(state)
    with pytest.raises(ValueError, match="a run with mixture None instead of"):
        build().restore({})


@pytest.mark.parametrize("packing", Packing)
def test_without_shuffling_examples_come_in_the_order_of_the_files(make_text, packing):
    """Packing moves an example only inside its window; every epoch is alike."""
    config = DataConfig(
        make_text("in order", documents=48, longest=30),
        {"targets": 64},
        packing=packing,
        shuffle=False,
        **{"virtual_shards": 1, "look_ahead": 8, "plan_look_ahead": 8},
    )
    loader = lm_loader(config, batch_size=1)
    ids = []
    while len(ids) < 96:
        ids += [(epoch, index) for _, index, epoch in loader.examples_at(loader.state())[0]]
        next(loader)
    loader.close()
    window = 1 if packing in (Packing.NONE, Packing.CONCAT_AND_SPLIT) else 8
    windows = [sorted(ids[start : start + window]) for start in range(0, 96, window)]
    assert sum(windows, []) == sorted(ids)[:96]
    assert {index for _, index in ids[:48]} == set(range(48)) or packing is Packing.CONCAT_AND_SPLIT


# Indexed --------------------------------------------------------------------------------------------------------


def text_config(data, **changes):
    config = DataConfig(mixture=data["text"], feature_lengths={"targets": 64})
    return dataclasses.replace(config, **changes)


def lm_loader(config, batch_size=8, **options):
    options = {"objective": FullLM(), "architecture": Architecture.CAUSAL_DECODER, "batch_size": batch_size} | options
    return build_loader(config, **options)


def test_batch_k_needs_no_other_batch(data):
    """Law 5: a loader that starts at step k gives batch k, whatever its history."""
    config = text_config(data, mixture=data["text"].tasks_and_rates[0][0])
    whole = take(lm_loader(config), 9)
    loader = lm_loader(config)
    loader.restore(lm_loader(config).state() | {"step": 8})
    same(next(loader), whole[8])
    loader.close()


def test_an_epoch_has_every_window_once_and_the_next_another_order(data):
    task = data["text"].tasks_and_rates[0][0]
    in_order = joined(lm_loader(text_config(data, mixture=task), batch_size=1, one_pass=True))
    in_order = in_order["decoder_target_tokens"].tolist()
    count = len(in_order)
    loader = lm_loader(text_config(data, mixture=task), batch_size=1)
    rows = joined(take(loader, 2 * count))["decoder_target_tokens"].tolist()
    first, second = ([in_order.index(row) for row in rows[start : start + count]] for start in (0, count))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second and list(range(count)) not in (first, second)
    tokens = sum(len(text) + 1 for text in task.source.train)  # bytes and EOS
    assert loader.seen() == {task.name: Seen(2 * count, 2.0, 2 * tokens)}


def test_one_pass_has_every_token_of_the_text_in_order(data):
    rows = joined(lm_loader(text_config(data), split="validation"))
    ids = rows["decoder_target_tokens"][rows["decoder_segment_ids"] > 0]
    expected = []
    for task in data["text"].tasks():
        (shard,) = task.source.shards("validation")
        expected += [example["targets"] for example in task.encode(list(task.texts(task.source.read(shard))))]
    np.testing.assert_array_equal(ids, np.concatenate(expected))


def test_a_larger_batch_goes_on_at_the_next_row(data):
    config = text_config(data, mixture=data["text"].tasks_and_rates[0][0])
    rows = joined(take(lm_loader(config), 6))["decoder_target_tokens"]
    small, large = lm_loader(config), lm_loader(config, batch_size=16)
    take(small, 2)
    large.restore(small.state())
    np.testing.assert_array_equal(joined(take(large, 2))["decoder_target_tokens"], rows[16:48])
    assert large.state()["step"] == 4


def test_mixture_shares_and_accounting(data):
    """Rates hold over the rows, `dataset_ids` tell whose row it is, and `seen` agrees with what was served."""
    loader = lm_loader(text_config(data), batch_size=16)
    rows = joined(take(loader, 40))
    served = np.bincount(rows["dataset_ids"][:, 0], minlength=2)
    seen = loader.seen()
    assert [seen[name].drawn for name in loader.dataset_names] == served.tolist()
    # After step 6 the second has 4 of 5 parts.
    late = rows["dataset_ids"][6 * 16 :, 0]
    assert abs(late.mean() - 0.8) < 0.02


@pytest.mark.parametrize("objective", [FullLM(), PrefixLM()], ids=lambda objective: objective.name)
def test_document_masks_follow_the_documents(data, objective):
    """Segments change exactly after EOS, positions restart there, and the tokens are those without masks."""
    options = {"objective": objective, "architecture": Architecture.PREFIX_DECODER}
    plain = joined(take(lm_loader(text_config(data), **options), 4))
    masked = joined(take(lm_loader(text_config(data, document_mask=True), **options), 4))
    np.testing.assert_array_equal(masked["decoder_loss_weights"], plain["decoder_loss_weights"])
    tokens, segments = masked["decoder_target_tokens"], masked["decoder_segment_ids"]
    np.testing.assert_array_equal(tokens, plain["decoder_target_tokens"])
    real = segments[:, 1:] > 0
    ended = (tokens[:, :-1] == 1) & real
    np.testing.assert_array_equal((np.diff(segments) == 1) & real, ended)
    assert ended.sum() > 10
    assert (masked["decoder_positions"][:, 1:][ended] == 0).all()
    assert (masked["decoder_input_tokens"][:, 1:][ended] == 0).all()
    assert (np.diff(masked["decoder_positions"])[real & ~ended] == 1).all()


def test_documents_are_corrupted_apart(data):
    """Under a document mask encoder and decoder see the same documents, each with an end and sentinels of its own."""
    config = text_config(data, feature_lengths=LENGTHS, document_mask=True)
    options = {"objective": SpanCorruption(), "architecture": Architecture.ENCODER_DECODER}
    loader = lm_loader(config, **options)
    batch, first = joined(take(loader, 4)), loader.vocabulary.info().sentinel_ids[0]
    ids, targets = batch["decoder_segment_ids"], batch["decoder_target_tokens"]
    assert ids.max() > 2 and (ids.max(axis=1) == batch["encoder_segment_ids"].max(axis=1)).all()
    assert (targets[(batch["decoder_positions"] == 0) & (ids > 0)] == first).all()
    assert ((targets == first).sum(axis=1) == ids.max(axis=1)).all()
    for tokens, segments in ((targets, ids), (batch["encoder_input_tokens"], batch["encoder_segment_ids"])):
        last = np.diff(segments, axis=1, append=0) != 0
        assert (tokens[last & (segments > 0)] == 1).all()
    # In a decoder's row what inputs leave is the targets', so that less of the text is left out.
    columns = (ids > 0).sum() + (batch["encoder_segment_ids"] > 0).sum()
    options["architecture"] = Architecture.PREFIX_DECODER
    in_one_row = joined(take(lm_loader(config, **options), 4))["decoder_segment_ids"]
    assert in_one_row.shape[1] == sum(LENGTHS.values()) and (in_one_row > 0).sum() > columns


def test_noise_differs_between_epochs_hosts_and_data_sets(make_text):
    """Peers give every host the same masks; here they depend on the example and the epoch alone."""
    task = make_text("one window", documents=1, longest=3000)
    text = task.source.train[0][:64] * 40  # forty times the same window, so that only the noise can differ
    task = dataclasses.replace(task, source=dataclasses.replace(task.source, train=(text,)))
    config = DataConfig(mixture=task, feature_lengths={"targets": 64}, shuffle=False)

    def masks(**options):
        loader = build_loader(config, objective=MaskedLM(), architecture=Architecture.ENCODER, batch_size=20, **options)
        return joined(take(loader, 8))["encoder_loss_weights"][:, :60]

    one, other = (masks(rows=share(20, h, 2)) for h in range(2))
    everything = np.concatenate([one, other])
    assert len({tuple(mask) for mask in everything}) == len(everything)
    # 9 of 60 are masked: two independent masks share 1.35 on average.
    shared = np.mean([(a * b).sum() for a, b in zip(one, other)])
    assert 0.6 < shared < 2.2


def test_rates_by_examples_follow_the_caches(make_text):
    tasks = (make_text("small", documents=10), make_text("large", documents=40, seed=1))
    mixture = Mixture("by examples", tuple((task, ExamplesRate()) for task in tasks))
    rows = joined(take(lm_loader(DataConfig(mixture, {"targets": 32}), batch_size=50), 10))
    assert abs(rows["dataset_ids"][:, 0].mean() - 0.8) < 0.02


def test_rates_by_examples_give_equal_epochs_however_rows_are_packed(make_pairs):
    """T0's rates: many short pairs share a row, where a long one fills it; each set has as many epochs as the other."""
    sizes = {"short": (6, 3), "long": (44, 14)}
    tasks = (make_pairs(name, 200, inputs, targets) for name, (inputs, targets) in sizes.items())
    mixture = Mixture("two sizes", tuple((task, TemplateRate(1)) for task in tasks))
    for packing in (Packing.PLAN, Packing.FIRST_FIT, Packing.NONE):
        config = DataConfig(mixture, LENGTHS, packing=packing, virtual_shards=4, look_ahead=16, plan_look_ahead=16)
        loader = stream_loader(config, 8)
        take(loader, 120)
        epochs = [seen.epochs for seen in loader.seen().values()]
        assert min(epochs) > 1 and max(epochs) / min(epochs) < 1.1, packing


def test_a_thousand_tasks_open_quickly(make_text, tmp_path):
    """From built caches; the budget is 5 s on an unloaded core, measured in CPU time because the machine is shared."""
    base = make_text("t", documents=3)
    tasks = tuple((dataclasses.replace(base, name=f"task {i}"), 1.0) for i in range(1000))
    config = DataConfig(Mixture("thousand", tasks), {"targets": 32}, cache_directory=str(tmp_path))
    lm_loader(config)
    start = time.process_time()
    loader = lm_loader(config, batch_size=64)
    next(loader)
    assert time.process_time() - start < 5.0
    assert len(json.dumps(loader.state())) <= 1024
    rows = joined([next(loader) for _ in range(16)])
    assert len(set(rows["dataset_ids"][:, 0])) > 900
    loader.close()


def test_a_single_short_document_fills_what_it_can(make_text):
    task = make_text("short", documents=1, longest=10)
    loader = lm_loader(DataConfig(task, {"targets": 64}), batch_size=2)
    batch = next(loader)
    loader.close()
    assert (batch["decoder_segment_ids"].sum(1) == len(task.source.train[0]) + 1).all()


def test_examples_are_named_so_that_their_text_is_found(data):
    """Windows by number, on any number of hosts."""
    config = text_config(data)
    loaders = [lm_loader(config, rows=share(8, h, 2)) for h in range(2)]
    rows = joined(take(loaders[0], 3)[2:] + take(loaders[1], 3)[2:])
    position = lm_loader(config).state() | {"step": 2}
    for loader in loaders:
        ids = loader.examples_at(position)
        assert len(ids) == 8 and all(len(row) == 1 for row in ids)
        for [(dataset, index, epoch)], tokens, number in zip(ids, rows["decoder_target_tokens"], rows["dataset_ids"]):
            alone = lm_loader(text_config(data, mixture=data["text"].tasks()[number[0]]), batch_size=1, one_pass=True)
            assert (dataset, epoch) == (loader.dataset_names[number[0]], 0)
            np.testing.assert_array_equal(joined(alone)["decoder_target_tokens"][index], tokens)


# Packed stream --------------------------------------------------------------------------------------------------


def stream_config(data, **changes):
    config = DataConfig(data["pairs"], LENGTHS, packing=Packing.FIRST_FIT, virtual_shards=64, look_ahead=256)
    return dataclasses.replace(config, **changes)


def stream_loader(config, batch_size=32, **options):
    return build_loader(
        config, objective=Supervised(), architecture=Architecture.ENCODER_DECODER, batch_size=batch_size, **options
    )


def test_the_streams_state_is_small_and_restored_quickly(data):
    loader = stream_loader(stream_config(data))
    take(loader, 40)
    state = loader.state()
    assert len(json.dumps(state)) <= 4096
    again = stream_loader(stream_config(data))
    start = time.process_time()
    again.restore(state)
    batches = take(again, 2)  # all 64 shards
    assert time.process_time() - start < 2.0
    same(batches[0], next(loader))
    loader.close()


def test_the_streams_examples_are_named_on_any_number_of_hosts(data):
    """A row's inputs and targets are those of the pairs that are named, in order."""
    pairs = {task.name: list(task.source.read(task.source.shards("train")[0])) for task in data["pairs"].tasks()}
    whole, half = stream_loader(stream_config(data)), stream_loader(stream_config(data), rows=share(32, 1, 2))
    take(whole, 1)
    position = whole.state()
    batch = take(whole, 1)[0]
    ids = half.examples_at(position)
    assert ids == whole.examples_at(position)
    for row, identities in zip(batch["decoder_target_tokens"], ids, strict=True):
        expected = [
            VOCABULARY.encode(pairs[name][index]["targets"])[: LENGTHS["targets"]] for name, index, _ in identities
        ]
        found = VOCABULARY.decode(row)
        assert [text for text in (VOCABULARY.decode(np.array(t)) for t in expected) if text not in found] == []


def test_batch_sizes_that_do_not_divide_the_shards(data):
    """6 rows and 4 shards share gcd 2: two hosts at most, and both see what one sees."""
    config = stream_config(data, virtual_shards=4, look_ahead=16)
    whole = take(stream_loader(config, 6), 5)
    slices = [take(stream_loader(config, 6, rows=share(6, h, 2)), 5) for h in range(2)]
    for k, batch in enumerate(whole):
        same(joined([one[k] for one in slices]), batch)


def pairs_in(rows):
    """The pairs in packed encoder-decoder rows, found again by their segments, as (inputs, targets) texts."""
    stacks = [(rows["encoder_segment_ids"], rows["encoder_input_tokens"])]
    stacks += [(rows["decoder_segment_ids"], rows["decoder_target_tokens"])]
    return [
        tuple(VOCABULARY.decode(ids[row][segments[row] == segment]) for segments, ids in stacks)
        for row in range(len(rows["decoder_segment_ids"]))
        for segment in range(1, rows["decoder_segment_ids"][row].max() + 1)
    ]


def cut(records):
    """Records as rows of LENGTHS hold them: 48 inputs, 15 targets and EOS."""
    return [(record["inputs"][:48], record["targets"][:15]) for record in records]


def test_pairs_leave_room_for_every_member_of_a_mixture(make_pairs):
    """One member ends both texts and the other neither: no example is longer than a row, and a plan knows it."""
    task = make_pairs("room", pairs=60, inputs=60, targets=24)
    mixed = objective_mixture.Mixture((Supervised(Eos.NONE), Supervised(Eos.BOTH)), (1.0, 1.0))
    config = DataConfig(task, LENGTHS, packing=Packing.FIRST_FIT, virtual_shards=4, look_ahead=16)
    loader = build_loader(config, objective=mixed, architecture=Architecture.ENCODER_DECODER, batch_size=4)
    found = pairs_in(joined(take(loader, 12)))
    assert max(len(inputs) for inputs, _ in found) == 47 and max(len(targets) for _, targets in found) == 15


@pytest.mark.parametrize("packing", [Packing.PLAN, Packing.FIRST_FIT, Packing.NONE])
def test_one_pass_has_every_pair_once(make_pairs, packing):
    task = make_pairs("validated", pairs=120, inputs=60, targets=20)
    config = DataConfig(task, LENGTHS, packing=packing, look_ahead=16, plan_look_ahead=16)
    rows = joined(stream_loader(config, 4, split="validation"))
    assert sorted(pairs_in(rows)) == sorted(cut(task.source.validation))


def test_the_stream_has_every_pair_once_an_epoch(make_pairs):
    """Pairs are dealt to shards and packed; no pair is ahead of another by more than the shards may be apart."""
    task = make_pairs("stream", pairs=64)
    config = DataConfig(task, LENGTHS, packing=Packing.FIRST_FIT, virtual_shards=4, look_ahead=16)
    found = pairs_in(joined(take(stream_loader(config, 4), 24)))
    expected = cut(task.source.train)
    assert set(found) == set(expected)
    counts = [found.count(pair) for pair in expected]
    assert min(counts) >= 2 and max(counts) - min(counts) <= 2


def test_what_shards_cannot_share_is_refused(data):
    with pytest.raises(
        ValueError, match="33 rows from 64 virtual shards in groups of 33, and .* hold a part of a group"
    ):
        stream_loader(stream_config(data), 33, rows=range(11))
    loaders = [stream_loader(stream_config(data), rows=share(32, h, 2)) for h in range(2)]
    with pytest.raises(ValueError, match="lacks virtual shard 32, because one host of several saved its own"):
        loaders[1].restore(loaders[0].state())


# Going on with other settings ----------------------------------------------------------------------------------


STEPS = 40
TO_PREFIX_LM = (Piecewise((0, 60), (1.0, 0.0)), Piecewise((0, 60), (0.0, 1.0)))
EVER_MORE = (1.0, Piecewise((0, 60), (0.1, 3.0)))


@pytest.fixture(scope="module")
def many(make_text):
    """Two tasks with examples for one epoch of the runs below; texts are shorter than rows."""
    tasks = [make_text(f"many {i}", documents=4000, longest=30, seed=i) for i in range(2)]

    def make(rates, packing=Packing.FIRST_FIT, **changes):
        config = DataConfig(
            Mixture("many", tuple(zip(tasks, rates))),
            {"inputs": 40, "targets": 24},
            packing=packing,
            virtual_shards=4,
            look_ahead=16,
            read_threads=0,
        )
        return dataclasses.replace(config, **changes)

    return make


def prefix_loader(config, objective, batch_size=4, **options):
    options = {"architecture": Architecture.PREFIX_DECODER, "batch_size": batch_size} | options
    return build_loader(config, objective=objective, **options)


def walk(loader, steps):
    """The position before each of so many batches and after them, and the examples of each batch."""
    positions, ids = [loader.state()], []
    for _ in range(steps):
        ids.append([one for row in loader.examples_at(positions[-1]) for one in row])
        next(loader)
        positions.append(json.loads(json.dumps(loader.state())))
    return positions, ids


SEAMS = {
    "objective": ((SpanCorruption(), (1.0, 1.0), 4), (FullLM(), (1.0, 1.0), 4)),
    "batch size": ((PrefixLM(), (1.0, 1.0), 4), (PrefixLM(), (1.0, 1.0), 8)),
    "batch size, scheduled objective": (
        (objective_mixture.Mixture((SpanCorruption(), PrefixLM()), TO_PREFIX_LM), (1.0, 1.0), 4),
        (objective_mixture.Mixture((SpanCorruption(), PrefixLM()), TO_PREFIX_LM), (1.0, 1.0), 8),
    ),
    "batch size, scheduled rates": ((PrefixLM(), EVER_MORE, 4), (PrefixLM(), EVER_MORE, 8)),
    "smaller batch, scheduled rates": ((PrefixLM(), EVER_MORE, 8), (PrefixLM(), EVER_MORE, 4)),
    "rates": ((PrefixLM(), (0.9, 0.1), 4), (PrefixLM(), (0.1, 0.9), 4)),
    "rates and all": ((SpanCorruption(), (0.9, 0.1), 4), (PrefixLM(), EVER_MORE, 8)),
}


@pytest.mark.parametrize("packing", [Packing.FIRST_FIT, Packing.NONE])
@pytest.mark.parametrize("seam", SEAMS)
def test_no_example_comes_twice_across_a_seam(many, seam, packing):
    """A stage, or a step of a ramp, begins after any step: what was read is not read again, what follows is exact."""
    (objective, rates, batch_size), (other, other_rates, other_size) = SEAMS[seam]
    first = prefix_loader(many(rates, packing), objective, batch_size)
    positions, before = walk(first, STEPS)
    assert len(set(sum(before, []))) == len(sum(before, []))
    second, resumed = (prefix_loader(many(other_rates, packing), other, other_size, start_step=20) for _ in range(2))
    for step in range(1, STEPS + 1):
        second.restore(positions[step], after=first)
        following, after = walk(second, 2)
        found = sum(before[:step] + after, [])
        assert len(set(found)) == len(found), step
        assert following[0]["step"] == step and {epoch for _, _, epoch in found} == {0}
        resumed.restore(following[1])
        assert walk(resumed, 1)[1] == after[1:]
    last = sum(after, [])
    if seam == "rates":
        assert np.mean([name == "many 1" for name, _, _ in last]) > 0.7


@pytest.mark.parametrize("packing", [Packing.FIRST_FIT, Packing.NONE])
def test_a_seam_skips_little(many, packing):
    """Where nothing is packed in another way the data go on at the next row, else after the windows in use."""
    first = prefix_loader(many((0.5, 0.5), packing), PrefixLM())
    positions, before = walk(first, STEPS)
    drawn = sum(map(len, before))
    for rates, batch_size in (((0.5, 0.5), 8), ((0.9, 0.1), 4)):
        second = prefix_loader(many(rates, packing), PrefixLM(), batch_size, start_step=STEPS)
        second.restore(positions[-1], after=first)
        moved = rates != (0.5, 0.5) and packing is Packing.FIRST_FIT
        skipped = sum(seen.drawn for seen in second.seen().values()) - drawn
        # Windows of 4 shards hold 64 examples, of which `seen` counts the begun as unused.
        assert (0 <= skipped <= 2 * 64) if moved else (-64 <= skipped <= 0)
        if not moved:
            assert json.loads(json.dumps(second.state())).get("positions") == positions[-1].get("positions")


@pytest.mark.parametrize("packing", [Packing.FIRST_FIT, Packing.CONCAT_AND_SPLIT])
def test_hosts_agree_across_a_seam(many, packing):
    (objective, rates, batch_size), (other, other_rates, other_size) = SEAMS["rates and all"]
    config, other_config = many(rates, packing), many(other_rates, packing)
    objective = other if packing is Packing.CONCAT_AND_SPLIT else objective  # whose windows would be longer
    first = prefix_loader(config, objective, batch_size)
    take(first, 7)
    second = prefix_loader(other_config, other, other_size, start_step=7)
    second.restore(first.state(), after=first)
    whole = take(second, 4)
    halves = []
    for host in range(2):
        before = [prefix_loader(config, objective, batch_size, rows=share(batch_size, h, 2)) for h in range(2)]
        for loader in before:
            take(loader, 7)
        state = json.loads(json.dumps(merge_states([loader.state() for loader in before])))
        loader = prefix_loader(other_config, other, other_size, rows=share(other_size, host, 2), start_step=7)
        loader.restore(state, after=before[host])
        halves.append(take(loader, 4))
    for k, batch in enumerate(whole):
        same(joined(half[k] for half in halves), batch)


def test_positions_at_other_rates_are_refused(many):
    """How much of each data set was read is not in a position; a stage of a run is told by the loader before it."""
    first = prefix_loader(many((0.9, 0.1)), PrefixLM())
    take(first, 3)
    with pytest.raises(ValueError, match="a run with other mixing rates; go on with that run's settings"):
        prefix_loader(many((0.1, 0.9)), PrefixLM()).restore(first.state())


def test_positions_of_earlier_versions_are_gone_on_with(build):
    """They lack what was added since, and are taken for positions of the same settings."""
    loader = build()
    take(loader, 3)
    state = loader.state()
    again = build()
    again.restore({name: value for name, value in state.items() if name not in ("rates", "packed")})
    same(next(again), next(loader))
    again.close()
    loader.close()
    with pytest.raises(ValueError, match="an earlier version"):
        again.restore(state | {"clocks": [[0, 0, 8.0], *state["clocks"]]})


def later_prefix_lm():
    """Span corruption that becomes prefix LM, whose examples are shorter."""
    weights = (Piecewise((0, 100), (1.0, 0.0)), Piecewise((0, 100), (0.0, 1.0)))
    return objective_mixture.Mixture((SpanCorruption(), PrefixLM()), weights)


def test_one_pass_is_as_at_its_first_step(data):
    """Lengths that depend on the step: a plan of one pass still holds for all its batches, at whatever step."""
    config = DataConfig(data["text"], LENGTHS, packing=Packing.PLAN)
    passes = {}
    for start_step in (0, 50, 100):
        loader = build_loader(
            config,
            objective=later_prefix_lm(),
            architecture=Architecture.CAUSAL_DECODER,
            split="validation",
            batch_size=1,
            start_step=start_step,
        )
        batches = list(loader)
        assert len(batches) == loader.num_batches
        passes[start_step] = joined(batches)["objective_ids"]
    assert not passes[0].any() and passes[100].any() and not np.array_equal(passes[50].any(1), passes[100].any(1))


@pytest.mark.parametrize("packing", [Packing.CONCAT_AND_SPLIT, Packing.FIRST_FIT, Packing.PLAN])
def test_a_lone_weight_gives_the_batches_of_its_member(data, packing):
    """What another member would take of a text does not matter where it is never drawn."""
    never = Piecewise((0, 10), (0.0, 0.0))
    mixtures = objective_mixture.Mixture((FullLM(), SpanCorruption()), (never, 2.0)), UL2(weights=(1.0, *[0.0] * 6))
    for mixed, pure in zip(mixtures, (SpanCorruption(), mixtures[1].mixture.members[0]), strict=True):
        config = DataConfig(data["modes"], LENGTHS, packing=packing, virtual_shards=4, look_ahead=16)
        build = functools.partial(build_loader, config, architecture=Architecture.PREFIX_DECODER, batch_size=4)
        loaders = [build(objective=objective) for objective in (mixed, pure)]
        assert loaders[0].objective.raw_length(LENGTHS, Architecture.PREFIX_DECODER) == pure.raw_length(
            LENGTHS, Architecture.PREFIX_DECODER
        )
        for a, b in zip(*(take(loader, 4) for loader in loaders), strict=True):
            assert set(a.pop("objective_ids").flat) <= {0, 1}
            del b["objective_ids"]
            same(a, b)


# Bad input (law 8) ----------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused_by_name(data):
    text, pairs = data["text"], data["pairs"]
    causal, both = Architecture.CAUSAL_DECODER, Architecture.ENCODER_DECODER

    def refused(message, config, objective, architecture, **options):
        with pytest.raises(ValueError, match=message) as raised:
            build_loader(config, objective=objective, architecture=architecture, **{"batch_size": 4} | options)
        assert "\n" not in str(raised.value)

    refused("masked_lm labels each input", DataConfig(text, LENGTHS), MaskedLM(), causal)
    refused("cannot be concatenated and split", DataConfig(pairs, LENGTHS), Supervised(), both)
    plan = Packing.PLAN
    refused("reads text alone and would drop the inputs", DataConfig(pairs, LENGTHS, plan), SpanCorruption(), both)
    refused("supervised needs examples with inputs", DataConfig(text, LENGTHS, plan), Supervised(), both)
    refused("supervised cannot fill rows", DataConfig(pairs, {"targets": 8}, plan), Supervised(), causal)
    packed = Packing.FIRST_FIT
    drawn = [objective_mixture.Mixture(pair, (1.0, 1.0)) for pair in itertools.permutations((PrefixLM(), Supervised()))]
    for mixed in drawn:
        refused("prefix_lm reads text alone and would drop the inputs", DataConfig(pairs, LENGTHS, packed), mixed, both)
        refused("supervised needs examples with inputs", DataConfig(text, LENGTHS, plan), mixed, both)
    few = DataConfig(data["modes"], {"inputs": 200, "targets": 200})
    refused("span_corruption needs .* sentinels for a text of", few, UL2(), causal)
    later = UL2(weights=(0.0, 0.0, 1.0, Piecewise((0, 9), (0.0, 1.0)), 0.0, 0.0, 0.0))
    refused("span_corruption needs .* sentinels for a text of", few, later, causal)
    build_loader(few, objective=UL2(weights=(0.0, 0.0, 1.0, *[0.0] * 4)), architecture=causal, batch_size=4)
    refused("codegen2 needs the special token '<sep>'", few, CodeGen2(), causal)
    refused("no task or mixture named 'sdtlib'", DataConfig("sdtlib", LENGTHS), FullLM(), causal)
    refused(r"Rows \[2, 4\] of a batch of 4 were asked for", DataConfig(text, LENGTHS), FullLM(), causal, rows=(2, 4))
    masked = DataConfig(data["modes"], LENGTHS, document_mask=True)
    refused("The objective mixture cannot keep the documents of a row apart", masked, UL2(), both)
    random_lengths = "Packing.PLAN needs examples whose length is the same"
    refused(random_lengths, DataConfig(text, LENGTHS, plan), PrefixLM(), both)
    refused(random_lengths, DataConfig(text, LENGTHS, plan), later_prefix_lm(), causal)
    with pytest.raises(ValueError, match="document_mask is for CONCAT_AND_SPLIT; with PLAN"):
        DataConfig(text, LENGTHS, plan, document_mask=True)
    with pytest.raises(ValueError, match="look_ahead must be at least 1, got 0"):
        DataConfig(text, LENGTHS, look_ahead=0)


def test_tasks_of_different_vocabularies_are_refused(data, make_text):
    first = make_text("first")
    second = text_task("second", first.source, ByteVocabulary(extra_ids=7))
    config = DataConfig(Mixture("two", ((first, 1.0), (second, 1.0))), {"targets": 16})
    with pytest.raises(ValueError, match="The tasks of 'two' have different vocabularies: 'first' .* and 'second'"):
        lm_loader(config)


def test_an_error_while_reading_ahead_reaches_the_caller(data):
    class Breaking(FullLM):
        def corrupt(self, example, vocabulary, rng, *, step=0):
            if step >= 2:
                raise RuntimeError("broken at step 2")
            return super().corrupt(example, vocabulary, rng, step=step)

    loader = lm_loader(text_config(data), objective=Breaking())
    take_two = [next(loader) for _ in range(2)]
    assert len(take_two) == 2
    with pytest.raises(RuntimeError, match="broken at step 2"):
        next(loader)
    loader.close()


def test_importing_the_loader_brings_neither_jax_nor_tensorflow(run_python):
    run_python(
        "import sys, jaxlm.data.loader, jaxlm.data.catalog\n"
        "assert not {'jax', 'grain', 'tensorflow', 'seqio'} & set(sys.modules)"
    )
