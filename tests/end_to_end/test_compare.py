"""`compare` prints what two Hugging Face models are, beside each other."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prune.cli.main import main


def evaluation(folder, name: str, perplexity: float, **changes) -> str:
    facts = {"perplexity": perplexity, "text": "t.txt", "windows": 3, "seq_length": 16, **changes}
    (folder / name).write_text(json.dumps(facts))
    return str(folder / name)


def test_the_table_says_what_both_models_are(tiny, tmp_path, capsys):
    before, after = tiny("mistral"), tmp_path / "after"
    cut = ["--ffn_hidden_size_remain", "48", "--metric", "random"]
    main(["prune-hf", "--model_name_or_path", str(before), "--output_path", str(after), *cut])
    evaluations = ["--before-evaluation", evaluation(tmp_path, "b.json", 20.0)]
    evaluations += ["--after-evaluation", evaluation(tmp_path, "a.json", 30.0)]
    words = ["compare", "--before", str(before), "--after", str(after), "--prompt", "A small text", "--max-new-tokens", "5"]
    capsys.readouterr()
    main([*words, *evaluations, "--output", str(tmp_path / "table.json")])
    printed = capsys.readouterr().out
    assert "3 windows of 16 tokens of t.txt" in printed and "1.500" in printed
    table = json.loads((tmp_path / "table.json").read_text())
    for name, model, perplexity, width in (("before", before, 20.0, 96), ("after", after, 30.0, 48)):
        row = table[name]
        assert row["parameters"] == sum(value.numel() for value in state_dict(model).values())
        assert row["perplexity"] == perplexity and row["ffn_hidden_size"] == width
        tokenizer, whole = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
        inputs = tokenizer("A small text", return_tensors="pt")
        made = whole.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        assert row["sample"] == tokenizer.decode(made[0], skip_special_tokens=True)


def test_evaluations_of_different_texts_are_refused(tiny, tmp_path, capsys):
    words = ["compare", "--before", str(tiny("mistral")), "--after", str(tiny("mistral"))]
    words += ["--before-evaluation", evaluation(tmp_path, "b.json", 20.0)]
    words += ["--after-evaluation", evaluation(tmp_path, "a.json", 20.0, text="other.txt")]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and "not of the same text" in capsys.readouterr().err
    words[-1] = evaluation(tmp_path, "a.json", 20.0, begins_with_bos=True)  # the other, of an earlier version, does not say it
    with pytest.raises(SystemExit):
        main(words)
    assert "not of the same text" in capsys.readouterr().err


def test_the_sample_of_a_model_with_a_chat_template_is_an_answer_to_a_turn(tiny, tmp_path, capsys):
    model = tmp_path / "chat"
    shutil.copytree(tiny("mistral"), model)
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    words = [
        "compare",
        "--before",
        str(model),
        "--after",
        str(tiny("mistral")),
        "--prompt",
        "A small text",
        "--max-new-tokens",
        "5",
    ]
    main([*words, "--output", str(tmp_path / "table.json")])
    assert "asked: A small text" in capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    tokenizer, whole = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    turn = [{"role": "user", "content": "A small text"}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    made = whole.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert table["before"]["sample"] == answer != table["after"]["sample"]
    assert table["after"]["sample"].startswith("A small text")


@pytest.mark.parametrize("template, said", [("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}", "no system"),
    ("{{ range(10**9) | list }}", "did not end"), ("nothing", "leaves out")])  # fmt: skip
def test_a_template_that_does_not_do_is_refused_by_name(tiny, tmp_path, capsys, template, said):
    model = tmp_path / "chat"
    shutil.copytree(tiny("mistral"), model)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(SystemExit) as left:
        main(["compare", "--before", str(tiny("mistral")), "--after", str(model), "--max-new-tokens", "2"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and "the chat template of chat" in error and said in error
