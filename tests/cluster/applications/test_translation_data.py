from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("babel")
pytest.importorskip("tokenizers")

from torch import nn

from expertmesh.examples.data.corpus import Corpus, padded
from expertmesh.examples.data.pairs import LEAST, LONGEST_LINE, generated_pairs, read_pairs
from expertmesh.examples.models.encoder_decoder import BEGIN, END, PAD, Transformer, beam_search
from expertmesh.experts.errors import ConfigError

GOOD = [f"text {number}\tText {number}\n" for number in range(LEAST)]


def model(vocabulary: int = 20) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(vocabulary=vocabulary, width=16, heads=2, depth=2, feed_forward=lambda: nn.Linear(16, 16))
    return made.eval()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 different pairs"),
        ("".join(GOOD[:3]).encode(), "3 different pairs"),
        ("".join([*GOOD, "no translation\n"]).encode(), f":{LEAST + 1}: 1 columns"),
        ("".join([*GOOD, "a\tb\tc\n"]).encode(), f":{LEAST + 1}: 3 columns"),
        ("".join([GOOD[0], "empty\t \n", *GOOD]).encode(), ":2: the translation is empty"),
        ("".join([GOOD[0], "\tleer\n", *GOOD]).encode(), ":2: the text is empty"),
        (GOOD[0].encode() + "\u00fc\t\u00fc\n".encode("latin-1"), ":2: the text is not UTF-8"),
        ("".join(GOOD).encode("utf-16"), ":1: the text is not UTF-8"),
        (b"nul \0\tNUL\n", ":1: it holds a NUL character"),
        (GOOD[0].encode() + b"x" * (LONGEST_LINE + 1) + b"\ty\n", ":2: the line has more than"),
        (GOOD[0].encode() + b"\xc3\xbc" * 40 * LONGEST_LINE, ":2: the line has more than"),
        ("".join(f"text {number}\tsame\n" for number in range(LEAST)).encode(), "all translations are the same"),
    ],
)  # fmt: skip
def test_s10_translation_names_file_and_row_of_bad_pairs(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_pairs(path)
    assert f"{path}" in error.value.message
    assert said in error.value.message
    assert "\n" not in error.value.message


def test_s10_translation_reads_pairs_and_leaves_repeated_texts_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("\ufeff" + "".join(GOOD) + "\n" + "text  0\tanother\n", encoding="utf-8")
    assert read_pairs(path) == [tuple(line.strip().split("\t")) for line in GOOD]


def test_s10_translation_generates_the_same_distinct_pairs_at_every_call() -> None:
    pairs = generated_pairs("en", "de", 1800)
    assert pairs == generated_pairs("en", "de", 1800)
    assert len(dict(pairs)) == len(pairs) == 1800
    assert dict(pairs)["Germany"] == "Deutschland"
    with pytest.raises(ConfigError, match="no language 'elvish'"):
        generated_pairs("en", "elvish")


def test_s10_translation_divides_pairs_and_gives_back_any_text() -> None:
    pairs = generated_pairs("en", "de", 300)
    corpus = Corpus.of(pairs, held=30, vocabulary=300, seed=1)
    parts = [set(corpus.train), set(corpus.late), set(corpus.held)]
    assert set.union(*parts) == set(pairs)
    assert sum(map(len, parts)) == len(pairs)
    text = "\u65e5\u672c \U0001f600 na\u00efve"
    tokens = corpus.subwords.encode([text])[0].tolist()
    assert (tokens[0], tokens[-1]) == (BEGIN, END)
    assert corpus.subwords.decode(tokens[1:-1]) == text


def test_s10_translation_batches_hold_every_pair_once_an_epoch_within_the_tokens() -> None:
    pairs = generated_pairs("en", "de", 200)
    corpus = Corpus.of(pairs, held=20, vocabulary=300, seed=1)
    batches = corpus.batches(corpus.train, 150, seed=2)
    assert batches.first(5) == batches.first(9)[:5]
    epoch, seen = batches.first(400), []
    for batch in epoch:
        longest = max(len(own[n]) for n in batch for own in (batches.sources, batches.targets))
        assert len(batch) == 1 or len(batch) * longest <= 150
        if len(seen) < len(corpus.train):
            seen += batch
    assert sorted(seen) == list(range(len(corpus.train)))


def test_s10_translation_decodes_token_by_token_what_it_decodes_at_once() -> None:
    torch.manual_seed(1)
    transformer = model()
    source, target = torch.randint(3, 20, (2, 5)), torch.randint(3, 20, (2, 6))
    source[1, 3:] = PAD
    with torch.no_grad():
        whole = transformer(source, target).view(2, 6, -1)
        memory, caches, real = transformer.encode(source), [], torch.ones(2, 1, dtype=torch.bool)
        for place in range(6):
            logits, caches = transformer.decode(target[:, place : place + 1], real, memory, caches)
            torch.testing.assert_close(logits, whole[:, place], atol=1e-5, rtol=1e-4)


def test_s10_translation_padding_and_other_sentences_change_nothing() -> None:
    torch.manual_seed(2)
    transformer = model()
    with torch.no_grad():
        transformer.embedding.weight[: END + 1] = 0.0  # so that words are likelier, and no sentence ends at once
    sources, target = [torch.randint(3, 20, (length,)) for length in (2, 4, 7)], torch.randint(3, 20, (1, 5))
    batch = padded(sources)
    together = beam_search(transformer, batch, beams=4)
    for number, source in enumerate(sources):
        assert together[number]
        assert beam_search(transformer, batch[number : number + 1], beams=4) == [together[number]]
        with torch.no_grad():
            whole = transformer(batch[number : number + 1], target)
            torch.testing.assert_close(transformer(source[None], target), whole, atol=1e-5, rtol=1e-4)


class Chances:
    """A model whose next token depends on the last one alone, by the table of the source's first token."""

    def __init__(self, *tables: dict[int, dict[int, float]]) -> None:
        self.tables = torch.full((len(tables), 7, 7), 1e-9)
        for number, table in enumerate(tables):
            for last, chances in table.items():
                for token, chance in chances.items():
                    self.tables[number, last, token] = chance

    def encode(self, source_BS: torch.Tensor) -> list[Any]:
        return [((source_BS[:, :1], source_BS[:, :1]), source_BS[:, :1])]

    def decode(self, last: torch.Tensor, going: torch.Tensor, memory: Any, caches: Any) -> tuple[torch.Tensor, Any]:
        tables = self.tables[memory[0][1][:, 0]]
        return tables[torch.arange(len(last)), last[:, 0]][going[:, 0]].log(), caches


def test_s10_translation_beams_find_the_sentence_that_greed_misses() -> None:
    misled = {BEGIN: {3: 0.6, 4: 0.4}, 3: {5: 0.6, 6: 0.4}, 4: {6: 1.0}, 5: {END: 0.5, 5: 0.5}, 6: {END: 1.0}}
    plain = {BEGIN: {5: 0.9, 4: 0.1}, 5: {END: 1.0}, 4: {END: 1.0}}
    chances: Any = Chances(misled, plain)
    sources = torch.tensor([[0], [1]])
    assert beam_search(chances, sources, beams=1) == [[3, 5], [5]]  # 0.6 · 0.6 · 0.5
    assert beam_search(chances, sources, beams=3) == [[4, 6], [5]]  # 0.4 · 1 · 1
