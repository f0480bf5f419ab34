import pytest
import transformers

from checks import TinyMlp, bert_graph, mlp_graph, tiny_bert
from tilecut.tokenize_texts import load_tokenizer, tokenizer_folder, why_no_text
from tilecut_passes.capture import capture
from tilecut_runtime.errors import CalibrationError
from tiny_tokenizer import CLS, PAD, SEP, UNK, ids_of, saved_with_tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    model = saved_with_tokenizer(tmp_path_factory.mktemp("model") / "bert")
    return capture(model), model


def test_a_tokenizer_is_looked_for_where_the_model_came_from(bert):
    assert tokenizer_folder(bert[1]) is not None
    assert tokenizer_folder(tiny_bert()) is None
    assert tokenizer_folder(TinyMlp()) is None


def test_why_no_text(bert):
    assert why_no_text(*bert) is None
    assert why_no_text(bert_graph(), tiny_bert()) == "the model has no tokenizer beside it"
    assert why_no_text(mlp_graph(), TinyMlp()) == "the model takes no input_ids"
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 24},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
                       "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    graph = capture(transformers.CLIPModel(config).eval())
    assert why_no_text(graph, bert[1]) == "the model takes more than texts (pixel_values)"


def test_texts_pairs_and_labels_become_rows(bert):
    tokenizer = load_tokenizer(*bert, sequence=12)
    (row,) = tokenizer.rows(["ab"])
    assert row["input_ids"] == [CLS, *ids_of("ab"), SEP] and tokenizer.pad == PAD
    (row,) = tokenizer.rows([("ab", "c")], [0.5])
    assert row["input_ids"] == [CLS, *ids_of("ab"), SEP, *ids_of("c"), SEP]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1] and row["labels"] == 0.5
    assert [len(row["input_ids"]) for row in tokenizer.rows(["x" * 50, "y"])] == [12, 3]
    with pytest.raises(CalibrationError, match="single texts and pairs of texts are mixed"):
        tokenizer.rows(["ab", ("c", "d")])


def test_the_share_of_unknown_ids(bert):
    tokenizer = load_tokenizer(*bert, sequence=12)
    assert tokenizer.unknown == UNK
    assert tokenizer.unknown_share(tokenizer.rows(["abc"])) == 0
    assert tokenizer.unknown_share([{"input_ids": [1, UNK, UNK, 5]}]) == 0.5
