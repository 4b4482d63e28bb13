"""A model directory in use."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import openm6
from openm6.compress.convert import import_model
from openm6.core.batch import pad
from openm6.core.errors import ContextLengthError, DataError, OpenM6Error, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import CAUSAL, IGNORE
from openm6.core.tokenizer import Tokenizer
from openm6.inference.session import Session
from openm6.model import M6
from openm6.model.cpu.pack import pack_for_cpu
from openm6.tasks.encode import encode_example
from openm6.tasks.forms import answer_constraint
from openm6.tasks.library import get as get_task
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.weights.directory import make_processor
from tests.conftest import command, drawing_session, tiny_config
from tests.tasks.conftest import picture

QUESTION = "图中的商品是什么？"


@pytest.fixture(scope="module")
def session() -> Session:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([QUESTION, "红色条纹"], 600, num_codes=8)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_codes=8)
    task = Task.from_instruction("[image:photo] 是什么? -> [label:kind|set=鞋,包,连衣裙]", name="kind")
    grid = ImageGrid(config.image_stride, config.image_max_patches)
    return Session(M6(config).eval(), Processor(tokenizer, grid, 64), [task])


def test_candidates_are_ranked_by_how_they_read() -> None:
    """With only the reading to rank by, the order is that of a whole forward pass over picture and caption."""
    session = drawing_session()
    asked = {"caption": "红色的杯子"}
    only = {"passes": 2, "guidance": 0, "relevance": 0, "fidelity": 0, "reading": 2.0}
    assert "reading" not in session.draw("text_to_image", candidates=3, decoding=only, **asked)[0].estimates
    session.tasks["caption"] = session.task("caption")
    drawn = session.draw("text_to_image", candidates=6, decoding=only, **asked)
    told = [candidate.estimates["reading"] for candidate in drawn]
    assert told == sorted(told, reverse=True) and len(set(told)) > 1
    for candidate, value in zip(drawn, told, strict=True):
        assert candidate.score == pytest.approx(2 * value)
        record = {"photo": candidate.image, **asked}
        sequence = encode_example(session.task("caption"), record, session.processor)
        with torch.inference_mode():
            logits = session.model.logits(session.model(pad([sequence], 0)).hidden[0]).log_softmax(-1)
        labels = torch.from_numpy(sequence.labels.astype(np.int64))
        places = (labels != IGNORE).nonzero().squeeze(1)
        assert value == pytest.approx(float(logits[places, labels[places]].sum()), rel=1e-3)
    # What was not asked for in words cannot be read back.
    style = np.zeros((16, 16, 3), np.uint8)
    found = session.draw("controlled_image", candidates=2, decoding=only, style=style)
    assert all("reading" not in candidate.estimates for candidate in found)


def test_a_saved_model_answers_as_before(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "m")
    loaded = Session.load(tmp_path / "m", trainable=True)
    assert loaded.tasks == session.tasks
    options = {"max_new_tokens": 6}
    for seed in range(3):
        asked = {"photo": picture(seed=seed), "question": QUESTION}
        assert loaded.run("vqa", decoding=options, **asked) == session.run("vqa", decoding=options, **asked)
    assert isinstance(openm6.load(str(tmp_path / "m")).run("vqa", decoding=options, **asked), str)


def test_labels_stay_in_their_set(session: Session) -> None:
    answers = list(session.run_many("kind", ({"photo": picture(seed=s)} for s in range(10)), batch_size=4))
    assert len(answers) == 10
    assert set(answers) <= {"鞋", "包", "连衣裙"}


def test_many_at_once_equal_one_by_one(session: Session) -> None:
    records = [{"photo": picture(16 + 8 * (s % 3), 24, seed=s), "question": QUESTION[: 3 + s]} for s in range(6)]
    options = {"max_new_tokens": 5}
    together = list(session.run_many("vqa", records, decoding=options))
    assert together == [session.run("vqa", decoding=options, **r) for r in records]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"num_beams": 2}])
def test_answers_do_not_depend_on_the_batch_size(session: Session, options: dict) -> None:
    """Nor does a record draw the random numbers of another one: 30 times the same question has many answers."""
    chosen = Session(pack_for_cpu(copy.deepcopy(session.model), torch.float32), session.processor)
    asked = [{"passage": QUESTION[: 2 + n % 7]} for n in range(20)] + [{"passage": QUESTION}] * 10
    decoding = {"max_new_tokens": 8, **options}
    every = [list(chosen.run_many("summary", asked, batch_size=size, decoding=decoding)) for size in (1, 3, 64)]
    assert every[0] == every[1] == every[2]
    assert (len(set(every[0][20:])) > 4) == ("temperature" in options)


LABELS = ["鞋", "鞋子", "包", "包包", "红色的鞋", "红色的包", "条纹", "😀"]


@pytest.mark.parametrize("text", ["[text:a] -> [label:kind]", "[text:a] -> 这是[label:kind]。"])
def test_label_probabilities_are_those_of_the_constrained_network(session: Session, text: str) -> None:
    """Against the definition: a forward pass over the prompt and what is written, for every token of every label."""
    task = Task.from_instruction(text, labels={"kind": LABELS})
    records = [{"a": QUESTION[:n]} for n in (1, 5, 3)]
    tokenizer = session.processor.tokenizer
    trie = answer_constraint(task, {}, session.processor.tokenizer)
    assert trie is not None
    plain = Session(pack_for_cpu(copy.deepcopy(session.model), torch.float32), session.processor)
    found = list(plain.label_probabilities(task, records, batch_size=2))
    for record, given in zip(records, found, strict=True):
        assert list(given) == LABELS and sum(given.values()) == pytest.approx(1)
        for label in LABELS:
            target = encode_example(task, {**record, "kind": label}, session.processor)
            with torch.no_grad():
                logits = session.model.logits(session.model(pad([target], 0)).hidden[0])
            places = (target.labels != IGNORE).nonzero()[0]
            ids, product = [int(target.labels[place]) for place in places], 1.0
            assert ids[-1] == tokenizer.end_id
            for n, place in enumerate(places):
                allowed = trie.next(ids[:n])
                product *= float(logits[place, allowed].softmax(-1)[allowed.index(ids[n])])
            assert given[label] == pytest.approx(product, rel=1e-3)


def test_many_labels_are_read_a_few_at_a_time(session: Session) -> None:
    labels = [f"{one}{other}" for one in "红条纹图中" for other in ("色", "色条", "的商")]
    task, record, rows = Task.from_instruction("[text:a] -> [label:kind]", labels={"kind": labels}), {"a": "红"}, []
    hook = session.model.blocks[0].register_forward_pre_hook(lambda block, given: rows.append(len(given[0])))
    few, many = (next(session.label_probabilities(task, [record], batch_size=size)) for size in (4, 64))
    hook.remove()
    reads = rows.index(1, 1)  # where the prompt is read again, for the second size
    assert max(rows[:reads]) == 4 < max(rows[reads:])
    assert few == pytest.approx(many) and sum(few.values()) == pytest.approx(1)


def test_label_probabilities_of_bad_records_and_of_other_tasks(session: Session) -> None:
    found = list(session.label_probabilities("kind", [{"photo": "gone.jpg"}, {"photo": picture()}], on_error="return"))
    assert isinstance(found[0], DataError) and set(found[1]) == {"鞋", "包", "连衣裙"}
    with pytest.raises(UsageError, match="its one output has to be a label"):
        list(session.label_probabilities("vqa", []))
    only = Task.from_instruction("[text:a] -> [label:b|set=鞋]")
    assert list(session.label_probabilities(only, [{"a": "红"}])) == [{"鞋": 1.0}]


def test_label_probabilities_are_of_the_choices_of_each_record(session: Session) -> None:
    """In one call; and the answer is one of them."""
    open_set = Task.from_instruction("[text:a]{可选: [choices|of=kind]。} -> [label:kind]")
    records = [{"a": "红", "choices": some} for some in ("鞋,包", ["红", "蓝", "绿"], "鞋,包")]
    found = list(session.label_probabilities(open_set, records))
    assert [list(one) for one in found] == [["鞋", "包"], ["红", "蓝", "绿"], ["鞋", "包"]] and found[0] == found[2]
    for record, one, answer in zip(records, found, session.run_many(open_set, records), strict=True):
        (alone,) = session.label_probabilities(open_set.with_labels({"kind": list(one)}), [{"a": record["a"]}])
        assert one == pytest.approx(alone) and answer in one
    with pytest.raises(UsageError, match="its one output has to be a label of a set"):
        list(session.label_probabilities(open_set, [{"a": "红"}]))


def test_the_command_tells_the_probabilities_of_labels(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "m")
    (tmp_path / "a.png").write_bytes(picture())
    told = json.loads(command("run", tmp_path / "m", "kind", f"photo={tmp_path / 'a.png'}", "--json").stdout)
    values = list(told["probabilities"].values())
    assert set(told["probabilities"]) == {"鞋", "包", "连衣裙"} and told["answer"] in told["probabilities"]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)


def test_a_task_that_the_model_was_never_trained_on_is_told(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = Session(session.model, session.processor, session.tasks.values())
    photo, options = picture(), {"max_new_tokens": 2}
    fresh.run("kind", photo=photo)
    fresh.run(Task.from_instruction(fresh.task("kind").instructions[0].text), photo=photo)  # the same by instruction
    assert not caplog.records
    for view in (fresh, fresh, fresh.adapter(None)):  # once, as a server makes a view for each request
        view.run("caption", photo=photo, decoding=options)
    assert [one.getMessage() for one in caplog.records] == [
        "The model was never trained on the task caption: its answers to it mean nothing. It was trained on: kind."
    ]
    fresh.run(Task.from_instruction("[image:photo] 多少? -> [text:answer]"), photo=photo, decoding=options)
    assert len(caplog.records) == 2
    session.save(tmp_path / "m")
    (tmp_path / "a.png").write_bytes(photo)
    for task, trained in (("kind", True), ("caption", False)):
        words = ("run", tmp_path / "m", task, f"photo={tmp_path / 'a.png'}", "-o", "max_new_tokens=2", "--json")
        assert json.loads(command(*words).stdout)["trained"] is trained


def test_a_text_that_is_too_long_is_refused_and_truncated_by_choice(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = Session(session.model, session.processor, [get_task("text_classification")])
    few, most = {"max_new_tokens": 2}, fresh.processor.max_length
    asked = ("text_classification", {"text": "红" * 2 * most})
    with pytest.raises(ContextLengthError, match=f"takes {most} .*Shorten text"):
        fresh.run(asked[0], decoding=few, **asked[1])
    with pytest.raises(ContextLengthError):
        list(fresh.stream(asked[0], decoding=few, **asked[1]))
    records = [{"text": "红"}, asked[1], {"text": "红色"}]
    found = list(fresh.run_many(asked[0], records, decoding=few, on_error="return"))
    assert [type(one) for one in found] == [str, ContextLengthError, str] and not caplog.records
    found = list(fresh.run_many(asked[0], records, decoding=few, truncate="start"))
    assert found[1] == fresh.run(asked[0], decoding=few, truncate="start", **asked[1])
    assert found[1] == "".join(fresh.stream(asked[0], decoding=few, truncate="start", **asked[1]))
    (told,) = [one.getMessage() for one in caplog.records]
    assert f"longer than the model takes ({most} positions)" in told
    with pytest.raises(UsageError, match='truncate is "end"'):
        fresh.run(asked[0], truncate="end", text="红")


def test_vectors_and_pictures_of_texts_that_are_too_long() -> None:
    session = drawing_session(max_length=96)
    long = "红" * 200
    with pytest.raises(ContextLengthError, match="and its answer"):
        session.draw("text_to_image", caption=long)
    assert len(session.draw("text_to_image", caption=long, truncate="start", decoding={"passes": 1})) == 1
    with pytest.raises(ContextLengthError, match="takes 96 "):
        session.run("text_vector", text=long)
    (vector,) = session.vectors("text_vector", [{"text": long}], truncate="start")
    (end,) = session.vectors("text_vector", [{"text": long[-95:]}])
    assert np.array_equal(vector, end)


def test_with_learned_positions_the_answer_has_to_fit_too(session: Session) -> None:
    config = tiny_config(vocab_size=session.processor.tokenizer.vocab_size, positions="learned")
    most = config.max_position_embeddings
    learned = Session(M6(config).eval(), replace(session.processor, max_length=most), [get_task("text_classification")])
    records = [{"text": "红" * count} for count in (3, most - 40)]
    found = list(learned.run_many("text_classification", records, decoding={"max_new_tokens": 12}, on_error="return"))
    assert isinstance(found[0], str) and isinstance(found[1], ContextLengthError) and "12 new tokens" in str(found[1])


def test_between_two_pieces_of_a_stream_the_caller_is_outside(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither this model's precision nor its mode of inference reaches the caller, and no other use the text."""
    monkeypatch.setattr("openm6.inference.session.fast_dtype", lambda kind: torch.bfloat16)
    asked, most = {"photo": picture(), "question": QUESTION}, 0
    for seed in range(8):
        options, pieces = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}, []
        for piece in session.stream("vqa", decoding=options, **asked):
            pieces.append(piece)
            assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
            session.run("vqa", decoding={"max_new_tokens": 2}, **asked)
        assert "".join(pieces) == session.run("vqa", decoding=options, **asked)
        most = max(most, len(pieces))
    assert most > 2


def test_a_bad_record_costs_itself_alone(session: Session) -> None:
    good, bad = {"photo": picture(), "question": QUESTION}, {"photo": "gone.jpg", "question": QUESTION}
    options = {"max_new_tokens": 6, "temperature": 1.0}
    asked = [good, good, bad, good, {"photo": picture()}, good]
    whole = list(session.run_many("vqa", [good] * len(asked), decoding=options))
    for size in (1, 64):
        found = list(session.run_many("vqa", asked, batch_size=size, decoding=options, on_error="return"))
        assert isinstance(found[2], DataError) and "gone.jpg does not exist" in str(found[2])
        assert isinstance(found[4], DataError) and "question is missing" in str(found[4])
        assert [found[i] for i in (0, 1, 3, 5)] == [whole[i] for i in (0, 1, 3, 5)]
    with pytest.raises(DataError, match="gone.jpg does not exist"):
        list(session.run_many("vqa", asked))
    with pytest.raises(UsageError, match='on_error is "skip"; it is "raise" or "return"'):
        list(session.run_many("vqa", asked, on_error="skip"))


@pytest.mark.parametrize(
    ("task", "good"),
    [("image_vector", {"photo": picture()}), ("controlled_image", {"caption": "红", "style": picture(16, 16)})],
)
def test_a_bad_record_of_a_task_without_text_costs_itself_alone(task: str, good: dict) -> None:
    session = drawing_session()
    bad = {**good, next(iter(set(good) & {"photo", "style"})): "gone.jpg"}
    same = {"seed": 0} if session.task(task).draws else {}
    found = list(session.run_many(task, [bad, good, good], on_error="return", decoding=same))
    assert isinstance(found[0], DataError)
    alone = list(session.run_many(task, [good, good, good], decoding=same))
    for one, same in zip(found[1:], alone[1:], strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(same))


def test_a_streamed_answer_is_the_answer_in_pieces(session: Session) -> None:
    asked = {"photo": picture(), "question": QUESTION}
    most = 0
    for seed in range(8):  # random weights: bytes that are no characters among them
        options = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}
        pieces = list(session.stream("vqa", decoding=options, **asked))
        assert "".join(pieces) == session.run("vqa", decoding=options, **asked)
        most = max(most, len(pieces))
    assert most > 2


@pytest.mark.parametrize("byte_level", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 3.0, "top_k": 50}, {"num_beams": 3}])
def test_half_a_character_never_comes_out(tmp_path: Path, byte_level: bool, options: dict) -> None:
    """Of a model that knows nothing, whose vocabulary has bytes: they follow each other as characters have them."""
    tokenizer = Tokenizer.train([QUESTION], 600, num_codes=8)
    if byte_level:
        fast = tokenizers.Tokenizer(tokenizers.models.BPE())
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        fast.train_from_iterator([QUESTION + "红色 red"] * 9, trainer)
        fast.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.wrap(tmp_path, num_codes=8)
    torch.manual_seed(1)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_codes=8, initializer_range=0.3)
    session = Session(M6(config).eval(), Processor(tokenizer, ImageGrid(8, 16), 64))
    task, said = Task.from_instruction("[text:a] -> [text:b]"), ""
    prompts = [session.prompt(task, {"a": QUESTION[:n]}) for n in range(1, 9)]
    for generated in session.generate(task, prompts, decoding={"max_new_tokens": 24, **options}):
        ids = generated.ids
        while tokenizer.begun(ids):  # cut off by max_new_tokens
            ids = ids[:-1]
        assert "\ufffd" not in tokenizer.decode_torn(ids)
        assert "\ufffd" not in session.read(task, generated)
        said += session.read(task, generated)
    assert said


def test_a_changed_pixel_and_a_changed_word_reach_the_answer(session: Session) -> None:
    task, model = session.task("vqa"), session.model

    def hidden(**record: object) -> torch.Tensor:
        prompt = session.prompt(task, record)
        with torch.no_grad():
            return model(pad([prompt], 0)).hidden[0, -1]

    pixels = np.zeros((32, 32, 3), np.uint8)
    other = pixels.copy()
    other[31, 31] = 255
    reference = hidden(photo=pixels, question=QUESTION)
    assert not torch.equal(reference, hidden(photo=other, question=QUESTION))
    assert not torch.equal(reference, hidden(photo=pixels, question="这" + QUESTION[1:]))


def test_wrong_requests_are_told(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"question is missing: the task vqa takes photo, question"):
        session.run("vqa", photo=picture())
    with pytest.raises(UsageError, match=r'no task "vqaa". Did you mean "vqa"'):
        session.run("vqaa", photo=picture())
    with pytest.raises(DataError, match="photo: The picture gone.jpg does not exist"):
        session.run("caption", photo="gone.jpg")
    with pytest.raises(UsageError, match="no option temprature"):
        session.run("caption", photo=picture(), decoding={"temprature": 1})
    for dims in (float("nan"), 0, 2.5, "8"):
        with pytest.raises(UsageError, match=f"dims is {dims}; vectors of this model have 1 to 32 numbers"):
            session.run("image_vector", photo=picture(), decoding={"dims": dims})
    with pytest.raises(UsageError, match="is no OpenM6 model: it has no openm6.json"):
        Session.load(tmp_path)


def test_a_model_with_a_damaged_card_or_weights_is_told(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path)
    card = tmp_path / "openm6.json"
    content = card.read_text("utf-8")
    card.write_text(content[:20], "utf-8")
    with pytest.raises(OpenM6Error, match="openm6.json is damaged"):
        Session.load(tmp_path)
    card.write_text(json.dumps({**json.loads(content), "format": 3}), "utf-8")
    with pytest.raises(OpenM6Error, match="openm6.json has the format 3; this version of OpenM6 reads 2"):
        Session.load(tmp_path)
    card.write_text(content, "utf-8")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}), "utf-8")
    with pytest.raises(OpenM6Error, match=r"has the shape .*but its config.json asks for"):
        Session.load(tmp_path)


def test_how_a_source_is_read_is_kept_with_the_model(session: Session, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=session.model.config.vocab_size, num_codes=8, source="causal")
    model = M6(config).eval()
    with pytest.raises(UsageError, match="The model has a causal source, the processor a bidirectional one"):
        Session(model, session.processor)
    made = Session(model, make_processor(config, session.processor.tokenizer, 64), session.tasks.values())
    made.save(tmp_path / "a")
    loaded = Session.load(tmp_path / "a")
    assert loaded.model.config.source == loaded.processor.source == "causal"
    assert set(loaded.prompt(loaded.task("kind"), {"photo": picture()}).blocks) == {CAUSAL}
    content = json.loads((tmp_path / "a/config.json").read_text("utf-8"))
    del content["source"]  # of a model from before, whose source was bidirectional
    (tmp_path / "a/config.json").write_text(json.dumps(content), "utf-8")
    assert Session.load(tmp_path / "a").processor.source == "bidirectional"
    (tmp_path / "a/config.json").write_text(json.dumps({**content, "source": "both"}), "utf-8")
    with pytest.raises(OpenM6Error, match='config.json: model.source is "both"; it can be bidirectional, causal'):
        Session.load(tmp_path / "a")


def test_large_models_are_saved_in_shards(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Session.load(tmp_path, trainable=True).model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in session.model.state_dict().items())


def test_a_qwen3_directory_becomes_a_model(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer.train(["今天天气很好"], 600, num_codes=0)
    config = Qwen3Config(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "qwen")
    # A foreign tokenizer: without our special tokens.
    content = json.loads(tokenizer._fast.to_str())
    names = {t["content"]: f"x{i}" for i, t in enumerate(content["added_tokens"])}
    content["model"]["vocab"] = {names.get(k, k): v for k, v in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    (tmp_path / "qwen" / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    import_model(tmp_path / "qwen", tmp_path / "m6", "stem", num_codes=16, max_length=512)
    loaded = Session.load(tmp_path / "m6", trainable=True)
    assert loaded.processor.tokenizer.first_new_id == 700
    assert loaded.processor.seen_tokens == frozenset(range(700))  # not the tokens that are added
    assert torch.equal(loaded.model.embed.weight[:700], theirs.model.embed_tokens.weight)
    answer = loaded.run("caption", photo=picture(), decoding={"max_new_tokens": 4})
    assert isinstance(answer, str)
    with pytest.raises(UsageError, match="exists already"):
        import_model(tmp_path / "qwen", tmp_path / "m6", "stem", 16, 128)
