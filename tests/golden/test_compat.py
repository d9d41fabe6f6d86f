"""Every stored conversation of the originals, tokens and labels, under the mode that repeats them; where they raised, so do we."""

import pytest
from golden.stored import NEMO, llava_case, load, nemo_case

from neva_jax.data.compat import ENCODERS
from neva_jax.data.tokenize import shift
from neva_jax.errors import DataError


def check(compat, case, tokenizer, options, record, expected):
    encoder = ENCODERS[compat](tokenizer, **options)
    what = {key: value for key, value in case.items() if key not in ("tokens", "labels", "input_ids")}
    if expected is None:
        with pytest.raises(DataError, match="record 0: conversations"):
            encoder(record, "record 0")
        return
    tokens, labels, media_index = shift(encoder(record, "record 0").stream, encoder.extra_token)
    assert tokens.tolist() == expected[0], what
    assert labels.tolist() == expected[1], what
    assert len(media_index) == len(tokens)


@pytest.mark.parametrize("version", NEMO)
def test_nemo(version):
    stored = load(NEMO[version])
    for case in stored["records"] + stored.get("interleaved", []):
        check(f"nemo_{version}", case, *nemo_case(case))


def test_llava():
    for case in load("llava_conversations.json.gz")["records"]:
        check("llava", case, *llava_case(case))
