"""How settings that differ from the recorded ones are described."""

from mimi_jax.files.changes import describe_changes


def test_equal_settings_have_no_changes():
    assert describe_changes({"dtype": "float32", "seed": 0}, {"seed": 0, "dtype": "float32"}) == ""


def test_each_change_is_named_with_both_values():
    old, new = {"dtype": "float32", "seed": 0, "count": 8}, {"dtype": "bfloat16", "seed": 0, "rate": 24_000}
    expected = "dtype was 'float32' and is 'bfloat16'; count was 8 and is None; rate was None and is 24000"
    assert describe_changes(old, new) == expected
