import pytest
import torch
import transformers as hf

import zoo


@pytest.mark.parametrize("name", zoo.NAMES)
def test_folder_loads_back_as_built(name, zoo_folder):
    built, _ = zoo.build(name)
    path = zoo_folder(name)
    loaded = hf.AutoModelForImageTextToText.from_pretrained(path)
    processor = hf.AutoProcessor.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), loaded.state_dict().values(), strict=True))
    text = "Hello, ça\n  va? red square"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", zoo.NAMES)
def test_linear_maps_take_multiples_of_four(name):
    model, _ = zoo.build(name)
    odd = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features % 4]
    assert not odd
