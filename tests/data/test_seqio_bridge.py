"""The bridge: seqio's tasks are trainable here, ours there, and both make the same batches of the same examples."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="the seqio extra is not installed", exc_type=ImportError)
import tensorflow as tf  # noqa: E402

from jaxlm.architecture import Architecture  # noqa: E402
from jaxlm.data import seqio_bridge, task_cache, tasks  # noqa: E402
from jaxlm.data.cache import open_cache  # noqa: E402
from jaxlm.data.converters import feature_converter  # noqa: E402
from jaxlm.data.loader import DataConfig, build_loader  # noqa: E402
from jaxlm.data.prompted import PromptedSet, prompted_mixture  # noqa: E402
from jaxlm.data.prompts import Prompt, Prompts  # noqa: E402
from jaxlm.data.sources import InMemory  # noqa: E402
from jaxlm.data.vocabularies import ByteVocabulary, SentencePieceVocabulary  # noqa: E402
from jaxlm.objectives.base import Example  # noqa: E402
from jaxlm.objectives.full_lm import FullLM  # noqa: E402
from jaxlm.objectives.masked_lm import MaskedLM  # noqa: E402
from jaxlm.objectives.span_corruption import SpanCorruption  # noqa: E402
from jaxlm.objectives.supervised import Supervised  # noqa: E402

MODULE = """
import functools, json, sys
import seqio, tensorflow as tf

if "bridge_pairs" not in seqio.TaskRegistry.names():
    V = seqio.ByteVocabulary(extra_ids=20)
    FEATURES = {name: seqio.Feature(V, add_eos=True) for name in ("inputs", "targets")}
    FILES = {"train": ["FOLDER/a.jsonl", "FOLDER/b.jsonl"], "validation": ["FOLDER/b.jsonl"]}

    def parse(dataset, names):
        def get(line):
            fields = [json.loads(line.decode()).get(name, "").encode() for name in names]
            return fields
        def one(line):
            out = tf.numpy_function(get, [line], [tf.string] * len(names))
            return {name: tf.ensure_shape(x, []) for name, x in zip(names, out)}
        return dataset.map(one)

    def add(name, fields, preprocessors):
        seqio.TaskRegistry.add(
            name, seqio.TextLineDataSource(FILES),
            preprocessors=[functools.partial(parse, names=list(fields.values())),
             functools.partial(seqio.preprocessors.rekey, key_map={k: v for k, v in fields.items()}),
             *preprocessors],
            output_features=FEATURES)

    CACHE = [seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos]
    add("bridge_pairs", {"inputs": "question", "targets": "answer"}, CACHE)
    add("bridge_pairs_uncached", {"inputs": "question", "targets": "answer"},
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
    add("bridge_text", {"inputs": "nothing", "targets": "answer"}, CACHE)
    seqio.TaskRegistry.add("bridge_other_features", seqio.TextLineDataSource(FILES), preprocessors=[],
                           output_features={"text": FEATURES["inputs"]})
    seqio.MixtureRegistry.add("bridge_mixture", [("bridge_text", 3.0)])
    seqio.MixtureRegistry.add("bridge_mixture_2", [("bridge_mixture", 1.0), ("bridge_pairs", 0.5)])
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Two files of records, and a module that registers seqio tasks over them."""
    folder = tmp_path_factory.mktemp("bridge")
    for name in "ab":
        rows = [{"question": f"{name}{i}?", "answer": f"{name}: " + f"text {i} " * (1 + i % 5)} for i in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bridge_tasks.py").write_text(MODULE.replace("FOLDER", str(folder)))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def own_cache(folder, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(folder / "cache"))


def wrapped(name):
    return seqio_bridge.wrap(name, modules=("bridge_tasks",))


def rows_of(folder, names="ab"):
    return [json.loads(line) for name in names for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def examples_of(task, split="train"):
    cache = open_cache(task, split)
    return [
        {f: cache.ids(f)[slice(*cache.offsets(f)[i : i + 2])].tolist() for f in cache.features}
        for i in range(cache.num_examples)
    ]


# Theirs, here


def test_a_seqio_task_of_text_gives_its_ids_with_eos_at_the_ends_of_documents(folder):
    task = wrapped("bridge_text")
    v = ByteVocabulary(20)
    expected = [{"targets": [*v.encode(row["answer"]).tolist(), 1]} for row in rows_of(folder)]
    assert examples_of(task) == expected
    assert examples_of(task, "validation") == expected[30:]
    assert task.output_features["targets"].vocabulary == v


def test_pairs_lose_their_eos_to_the_objective_whether_seqio_had_added_it_or_not(folder):
    v = ByteVocabulary(20)
    expected = [
        {"inputs": v.encode(r["question"]).tolist(), "targets": v.encode(r["answer"]).tolist()} for r in rows_of(folder)
    ]
    assert examples_of(wrapped("bridge_pairs")) == expected
    assert examples_of(wrapped("bridge_pairs_uncached")) == expected


def test_a_seqio_mixture_keeps_its_rates():
    mixture = wrapped("bridge_mixture")
    assert isinstance(mixture, tasks.Mixture) and [t.name for t in mixture.tasks()] == ["bridge_text"]
    shares = wrapped("bridge_mixture_2").shares(0, {})
    provider = seqio.get_mixture_or_task("bridge_mixture_2")
    rates = {t.name: provider.get_rate(t) for t in provider.tasks}
    assert shares == pytest.approx({name: rate / sum(rates.values()) for name, rate in rates.items()})


def test_a_wrapped_task_trains_through_the_loader(folder):
    config = DataConfig(wrapped("bridge_text"), {"targets": 64})
    loader = build_loader(config, objective=FullLM(), architecture=Architecture.CAUSAL_DECODER, batch_size=2)
    batch = next(loader)
    loader.close()
    stream = [i for e in examples_of(wrapped("bridge_text")) for i in e["targets"]]
    windows = [stream[i : i + 64] for i in range(0, len(stream), 64)]
    assert all(row in windows for row in batch["decoder_target_tokens"].tolist())


def test_a_seqio_task_is_one_gin_line_away(folder, monkeypatch):
    from jaxlm.configuration import resolve_or_exit

    monkeypatch.chdir(__file__.rsplit("/tests/", 1)[0])
    (folder / "run.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxlm.data import config\n"
        "from jaxlm.data import seqio_bridge\n"
        "config.DataConfig.mixture = @seqio_bridge.wrap()\n"
        "config.DataConfig.feature_lengths = {'targets': 64}\n"
        "seqio_bridge.wrap.name = 'bridge_mixture'\n"
        "seqio_bridge.wrap.modules = ('bridge_tasks',)\n"
    )
    config = resolve_or_exit(DataConfig, [f"--gin_file={folder / 'run.gin'}"])
    assert config.mixture == wrapped("bridge_mixture")


def test_a_wrapped_task_cached_by_the_tool_needs_no_tensorflow(folder, tmp_path, capsys):
    import runpy
    import subprocess

    tool = __file__.rsplit("/tests/", 1)[0] + "/tools/cache_tasks.py"
    flags = ["--tasks", "bridge_pairs", "--seqio", "--modules", "bridge_tasks", "--workers", "1"]
    runpy.run_path(tool)["main"]([*flags, "--out", str(tmp_path)])
    assert "fingerprint" in capsys.readouterr().out
    assert examples_of(task_cache.cached_task(str(tmp_path / "bridge_pairs"))) == examples_of(wrapped("bridge_pairs"))
    code = (
        "import sys; from jaxlm.data import task_cache, cache; "
        f"c = cache.open_cache(task_cache.cached_task({str(tmp_path / 'bridge_pairs')!r}), 'validation'); "
        "assert c.num_examples == 30; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tool.rsplit("/", 2)[0])


def test_what_cannot_be_wrapped_is_named():
    with pytest.raises(ValueError, match="nearest are bridge_text"):
        wrapped("bridge_txet")
    with pytest.raises(ValueError, match="add a preprocessor"):
        wrapped("bridge_other_features")
    with pytest.raises(ValueError, match="no split 'test'; it has"):
        open_cache(wrapped("bridge_text"), "test")
    with pytest.raises(ValueError, match="pass `vocabulary`"):
        seqio_bridge.vocabulary_from_seqio(seqio.PassThroughVocabulary(100))


def test_vocabularies_have_seqios_ids(tmp_path):
    import sentencepiece

    text = ["The cat sat; naïve café, 東京 and a number 12345 " * 3 + str(i) for i in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "m"), vocab_size=120, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, byte_fallback=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = str(tmp_path / "m.model")
    for theirs, ours in (
        (seqio.ByteVocabulary(7), ByteVocabulary(7)),
        (seqio.SentencePieceVocabulary(path, 5), SentencePieceVocabulary(path, 5)),
    ):
        assert seqio_bridge.vocabulary_from_seqio(theirs) == ours
        assert (theirs.vocab_size, theirs.eos_id, theirs.unk_id) == (ours.size, ours.info().eos_id, ours.info().unk_id)
        for line in (*text[:2], "unknown: ☃", ""):
            assert list(theirs.encode(line)) == ours.encode(line).tolist()
            back = seqio_bridge.SeqioVocabulary(ours)
            assert back.encode_tf(tf.constant(line)).numpy().tolist() == ours.encode(line).tolist()
            assert back.decode_tf(tf.constant(ours.encode(line))).numpy().decode() == ours.decode(ours.encode(line))
    theirs = seqio.SentencePieceVocabulary(path, 5)
    sentinels = [theirs.tokenizer.PieceToId(f"▁<extra_id_{i}>") for i in range(5)]
    assert sentinels == list(SentencePieceVocabulary(path, 5).info().sentinel_ids)
    with pytest.raises(ValueError, match="no jaxlm vocabulary"):
        seqio_bridge.vocabulary_from_seqio(seqio.SentencePieceVocabulary(path, 5, reverse_extra_ids=False))


# Without a cache


def stream(name="bridge_mixture_2", **more):
    arguments = dict(
        feature_lengths={"inputs": 24, "targets": 64},
        objective=Supervised() if name == "bridge_pairs" else FullLM(),
        architecture=Architecture.PREFIX_DECODER,
        batch_size=4,
        modules=("bridge_tasks",),
        look_ahead=16,
    )
    return seqio_bridge.stream_loader(name, **arguments | more)


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", ["bridge_pairs", "bridge_text"])
def test_a_stream_resumes_by_skipping(name, caplog):
    loader = stream(name)
    assert "resumes by skipping" in caplog.text and "1 host(s)" in caplog.text
    batches, states = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(loader.state())))
        batches.append(next(loader))
    assert {k: (v.shape, v.dtype) for k, v in batches[0].items()} == loader.features
    for k in (1, 4, 8):
        again = stream(name)
        again.restore(states[k])
        assert_equal_batches(next(again), batches[k])
    with pytest.raises(ValueError, match="hosts 1, here 2"):
        stream(name, host_count=2).restore(states[1])
    with pytest.raises(ValueError, match="seed 0, here 1"):
        stream(name, seed=1).restore(states[1])


def test_hosts_of_a_stream_read_different_examples_and_every_text_is_whole(folder):
    texts = {row["answer"] for row in rows_of(folder)}
    seen = []
    for host in range(2):
        loader = stream("bridge_pairs", host_count=2, host_index=host, shuffle_buffer=1)
        found = set()
        for _ in range(6):
            batch = next(loader)
            for ids, segments, weights in zip(
                batch["decoder_target_tokens"], batch["decoder_segment_ids"], batch["decoder_loss_weights"]
            ):
                for segment in range(1, segments.max() + 1):
                    target = ids[(segments == segment) & (weights > 0)]
                    assert target[-1] == 1
                    found.add(loader.vocabulary.decode(target))
        assert found <= texts and len(found) > 20
        seen.append(found)
    assert not seen[0] & seen[1]


# The same batches


def next_fit(examples, converter):
    """Rows as seqio's packing fills them: in order, a new row when an example does not fit."""
    rows, room = [], None
    for example in examples:
        size = np.array(converter.size(example))
        if room is None or (size > room).any():
            rows.append([])
            room = np.array(converter.capacity)
        rows[-1].append(example)
        room = room - size
    return rows


def random_examples(architecture, rng):
    lengths = rng.integers(1, 12, (40, 2))
    if architecture is Architecture.CAUSAL_DECODER:
        lengths[:, 0] = 0
    if architecture is Architecture.ENCODER:
        lengths[:, 0] = lengths[:, 1]
    return [Example(*(rng.integers(3, 90, n).astype(np.int32) for n in pair)) for pair in lengths]


@pytest.mark.parametrize("architecture", Architecture)
def test_packed_batches_equal_seqios_feature_converters_bit_for_bit(architecture):
    """Law: a batch means the same to a T5X user (ids above 0: seqio takes 0 for padding, we do not)."""
    rng = np.random.default_rng(0)
    examples = random_examples(architecture, rng)
    lengths = {"inputs": 20, "targets": 24}
    mask_id = 95
    if architecture is Architecture.ENCODER:
        # seqio's encoder converter takes the weights from the mask; ours takes the objective's.
        lengths = {"inputs": 24, "targets": 24}
        for example in examples:
            masked = rng.random(len(example.inputs)) < 0.3
            example.inputs = np.where(masked, mask_id, example.targets).astype(np.int32)
            example.weights = masked.astype(np.float32)
    theirs, task_lengths = {
        Architecture.CAUSAL_DECODER: (seqio.LMFeatureConverter, {"targets": 44}),
        Architecture.PREFIX_DECODER: (seqio.PrefixLMFeatureConverter, lengths),
        Architecture.ENCODER: (lambda **kw: seqio.EncoderFeatureConverter(mask_id=mask_id, **kw), lengths),
        Architecture.ENCODER_DECODER: (seqio.EncDecFeatureConverter, lengths),
    }[architecture]
    names = ("targets",) if architecture is Architecture.CAUSAL_DECODER else ("inputs", "targets")
    dataset = tf.data.Dataset.from_generator(
        lambda: ({name: getattr(example, name) for name in names} for example in examples),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in names},
    )
    expected = list(theirs(pack=True)(dataset, task_lengths).as_numpy_iterator())
    converter = feature_converter(architecture, lengths)
    batch = converter.batch(next_fit(examples, converter))
    assert len(expected) == len(batch["dataset_ids"]) > 5
    for name in expected[0]:
        column = np.stack([row[name] for row in expected])
        assert name in batch, name
        np.testing.assert_array_equal(column.astype(batch[name].dtype), batch[name], err_msg=name)
    extra = set(batch) - set(expected[0])
    assert extra <= {"dataset_ids", "objective_ids"}


# Ours, there


@pytest.fixture(scope="module")
def ours():
    """A task of ours with its texts, registered."""
    texts = tuple(f"document {i}: " + f"word {i} " * (5 + i % 11) for i in range(60))
    task = tasks.text_task("bridge_ours", InMemory(texts, texts[:5]), ByteVocabulary(100))
    other = tasks.text_task("bridge_ours_2", InMemory(texts[:20]), ByteVocabulary(100))
    tasks.register(task)
    tasks.register(other)
    tasks.register(tasks.Mixture("bridge_ours_mix", ((task, 1.0), (other, tasks.ExamplesRate(maximum=10)))))
    return task, texts


def test_our_tasks_and_mixtures_are_in_seqios_registries(ours):
    task, texts = ours
    names = seqio_bridge.register_with_seqio(["bridge_ours_mix"])
    assert names == ["bridge_ours", "bridge_ours_2", "bridge_ours_mix"]
    dataset = seqio.get_dataset(
        "bridge_ours",
        task_feature_lengths={"targets": 128},
        dataset_split="train",
        shuffle=False,
        feature_converter=seqio.LMFeatureConverter(pack=False),
    )
    rows = [row["decoder_target_tokens"] for row in dataset.as_numpy_iterator()]
    v = ByteVocabulary(100)
    assert [row[row > 0].tolist() for row in rows] == [[*v.encode(t), 1][:128] for t in texts]
    provider = seqio.get_mixture_or_task("bridge_ours_mix")
    assert {t.name: provider.get_rate(t) for t in provider.tasks} == pytest.approx(
        {"bridge_ours": 1 / 11, "bridge_ours_2": 10 / 11}
    )
    assert seqio_bridge.wrap("bridge_ours").output_features["targets"].vocabulary == v  # and back


@dataclasses.dataclass(frozen=True)
class Several(Prompts):
    """Several ways to ask."""

    prompts: tuple[Prompt, ...]

    def templates(self):
        return self.prompts


def test_a_prompted_mixture_is_seqios_too():
    """Templates by data sets become tasks under names that seqio allows, at T0's rates, with pairs as they train."""
    sizes = {"small": 30, "large": 80}
    prompts = (
        Prompt(name="is it?", context="{{ text }}?", choices='["no", "yes"]', gold="label"),
        Prompt(name="tell-me", context="Tell: {{ text }}", choices='["no", "yes"]', gold="label"),
    )
    sets = tuple(
        PromptedSet(
            f"bridge_{name}",
            InMemory(tuple({"text": f"{name} {i}", "label": i % 2} for i in range(n))),
            Several(prompts),
        )
        for name, n in sizes.items()
    )
    mixture = tasks.register(prompted_mixture("bridge_prompted", sets, ByteVocabulary(), cap=50))
    found = seqio_bridge.register_with_seqio(["bridge_prompted"], objective=Supervised(), splits=("train",))
    names = {
        f"bridge_{name}/{prompt.name}": f"bridge_{name}_{theirs}"
        for name in sizes
        for prompt, theirs in zip(prompts, ("is_it_", "tell_me"))
    }
    assert found == sorted([*names.values(), "bridge_prompted"])
    provider = seqio.get_mixture_or_task("bridge_prompted")
    # 30 and 30 of the small one, 50 // 2 each of the one above the cap.
    expected = {"bridge_small": 30 / 110, "bridge_large": 25 / 110}
    rates = {task.name: provider.get_rate(task) for task in provider.tasks}
    assert rates == pytest.approx({theirs: expected[ours.split("/")[0]] for ours, theirs in names.items()})
    assert {task.name for task in mixture.tasks()} == set(names)
    dataset = seqio.get_dataset(
        "bridge_small_tell_me",
        task_feature_lengths={"inputs": 64, "targets": 8},
        dataset_split="train",
        shuffle=False,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
    )
    v, (first, *_) = ByteVocabulary(), dataset.as_numpy_iterator()
    assert v.decode(first["encoder_input_tokens"]) == "Tell: small 0"
    assert first["decoder_target_tokens"].tolist() == [*v.encode("no").tolist(), 1, 0, 0, 0, 0, 0]
    assert first["decoder_loss_weights"].sum() == 3
    batches = seqio.get_dataset(
        "bridge_prompted",
        task_feature_lengths={"inputs": 64, "targets": 8},
        dataset_split="train",
        shuffle=True,
        seed=0,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
    )
    texts = {v.decode(row["decoder_target_tokens"]) for row in itertools.islice(batches.as_numpy_iterator(), 20)}
    assert all(not text.replace("yes", "").replace("no", "") for text in texts)


def test_names_that_become_one_are_refused():
    pairs = InMemory(({"inputs": "a", "targets": "b"},))
    for name in ("bridge one", "bridge-one"):
        tasks.register(tasks.pairs_task(name, pairs, ByteVocabulary()))
    with pytest.raises(ValueError, match="'bridge one' and 'bridge-one' have the same name in seqio, 'bridge_one'"):
        seqio_bridge.register_with_seqio(["bridge one", "bridge-one"])


def test_rates_that_change_over_training_are_refused(ours):
    from jaxlm.piecewise import Piecewise

    tasks.register(tasks.Mixture("bridge_changing", ((ours[0], Piecewise((0, 10), (0.0, 1.0))),)))
    with pytest.raises(ValueError, match="change over training"):
        seqio_bridge.register_with_seqio(["bridge_changing"])


def test_our_objectives_corrupt_in_seqios_pipeline(ours):
    """Also the trap of seqio's seeds: two hosts with one seed must not draw the same noise for other texts."""
    task, texts = ours
    objective, architecture = SpanCorruption(), Architecture.ENCODER_DECODER
    feature = seqio.Feature(seqio_bridge.SeqioVocabulary(ByteVocabulary(100)), add_eos=True)
    seqio.TaskRegistry.add(
        "bridge_denoise",
        seqio_bridge._TaskSource(task, ("train",)),
        preprocessors=list(seqio_bridge.objective_preprocessors(objective, architecture)),
        output_features={"inputs": feature, "targets": feature},
    )

    def pairs(seed, shard=0, shards=1):
        dataset = seqio.get_mixture_or_task("bridge_denoise").get_dataset(
            {"inputs": 100, "targets": 30}, "train", shuffle=False, seed=seed, shard_info=seqio.ShardInfo(shard, shards)
        )
        return [Example(row["inputs"], row["targets"]) for row in dataset.as_numpy_iterator()]

    info = ByteVocabulary(100).info()
    whole = pairs(0)
    restored = np.concatenate([objective.restore(example, info) for example in whole])
    v = ByteVocabulary(100)
    assert restored.tolist() == [i for t in texts for i in [*v.encode(t), 1]]
    assert max(len(e.inputs) for e in whole) <= 100 and max(len(e.targets) for e in whole) <= 30
    again, other = pairs(0), pairs(1)
    assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(whole, again))
    assert not all(np.array_equal(a.inputs, b.inputs) for a, b in zip(whole, other))

    def noise(examples):
        full = [e for e in examples if len(e.inputs) == len(examples[0].inputs)]
        return [np.flatnonzero(np.isin(e.inputs, info.sentinel_ids)).tolist() for e in full]

    hosts = [noise(pairs(0, shard, 2)) for shard in range(2)]
    same = np.mean([a == b for a, b in zip(*hosts)])
    assert len(hosts[0]) > 10 and same < 0.2


def test_objectives_that_seqios_features_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="labels each input position"):
        seqio_bridge.objective_preprocessors(MaskedLM(), Architecture.ENCODER_DECODER)
