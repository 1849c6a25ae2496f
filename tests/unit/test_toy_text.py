"""The toy's text encoder, which is drawn from a seed on every machine."""

import pytest
from lcm_lora.dev.toy import text

# By hand from PCG64's raw bits, which NumPy keeps stable.
FIRST = [0.0160980224609375, 0.028594970703125, 0.01165008544921875, 0.0170135498046875]


def test_the_text_encoder_is_the_same_draw_everywhere():
    drawn = text.state_dict()
    token = drawn["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    assert token.shape == (49408, 768)
    assert token.float().std() == pytest.approx(0.02, rel=1e-3)
    assert token[0, :4].tolist() == FIRST
    assert len(drawn) == 2 + 12 * 16 + 2
