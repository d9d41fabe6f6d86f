"""Every scorer against what the official evaluators said, case by case: ../shared/golden/evaluation."""

import functools
import gzip
import json

import pytest
from helpers import golden

from neva_jax.errors import DataError
from neva_jax.evaluation import answer_text, gqa, mme, pope, scienceqa, textvqa, vqav2
from neva_jax.evaluation.question import Question, Row

EXACT = 1e-9


def close(value):
    return pytest.approx(value, rel=EXACT, abs=EXACT)


@functools.cache
def cases(name: str) -> dict:
    with gzip.open(golden(f"evaluation/{name}.json.gz")) as file:
        return json.load(file)


# ---- VQAv2 ---------------------------------------------------------------------------------------------------------------------------------------------


def vqav2_questions(found: list[dict]) -> list[Question]:
    def truth(case):
        people = [{"answer": answer, "answer_id": i} for i, answer in enumerate(case["gt_answers"], 1)]
        return {"answers": people, "question_type": case["question_type"], "answer_type": case["answer_type"]}

    return [Question(case["question_id"], "?", truth=truth(case)) for case in found]


def test_vqav2_of_each_case():
    found = cases("vqav2")["cases"]
    for case, question in zip(found, vqav2_questions(found), strict=True):
        answer = answer_text.one_line(case["answer"])
        assert answer_text.vqa_answer(answer) == case["processed_prediction"], case
        assert (answer_text.vqa_answer(answer) if case["normalised"] else answer) == case["compared_prediction"], case
        plain = answer_text.vqa_answer if case["normalised"] else str
        assert [plain(answer_text.one_line(a)) for a in case["gt_answers"]] == case["processed_gt_answers"], case
        assert vqav2.accuracy(case["answer"], question.truth["answers"]) == close(case["accuracy"]), case
        assert answer_text.evalai_answer(case["answer"]) == case["llava_submission_answer"], case
        uploaded = vqav2.accuracy(case["llava_submission_answer"], question.truth["answers"])
        assert round(100 * uploaded, 2) == case["accuracy_official_llava_submission"], case


def test_vqav2_overall():
    found = cases("vqav2")
    scores = vqav2.score(vqav2_questions(found["cases"]), [case["answer"] for case in found["cases"]]).scores
    for name, ours in (("overall", scores), ("overall_llava_submission", scores["submission"])):
        official = found[name]["n10"]
        assert ours["accuracy"] == close(official["overall"])
        assert ours["per_answer_type"] == close(official["perAnswerType"])
        assert ours["per_question_type"] == close(official["perQuestionType"])


def test_vqav2_follows_python_3_where_the_pythons_differ():
    for case in cases("vqav2")["python2_vs_python3"]:
        assert answer_text.vqa_answer(case["answer"]) == case["processed_python3"]


# ---- TextVQA -------------------------------------------------------------------------------------------------------------------------------------------


def test_textvqa():
    found = cases("textvqa")
    for case in found["cases"]:
        assert answer_text.evalai_answer(case["pred_answer"]) == case["processed_prediction"], case
        assert [answer_text.evalai_answer(a) for a in case["gt_answers"]] == case["processed_gt_answers"], case
        assert textvqa.accuracy(case["pred_answer"], case["gt_answers"]) == close(case["score"]), case
        for answer, score in case["unique_answer_scores"].items():
            raw = case["gt_answers"][case["processed_gt_answers"].index(answer)]
            assert textvqa.accuracy(raw, case["gt_answers"]) == close(score), case
    questions = [Question(case["id"], "?", truth=case["gt_answers"]) for case in found["cases"]]
    assert textvqa.score(questions, [case["pred_answer"] for case in found["cases"]]).scores == {"accuracy": close(100 * found["overall_accuracy"])}


def test_stvqa():
    found = cases("textvqa")
    for case in found["stvqa_cases"]:
        assert textvqa.stvqa_accuracy(case["pred_answer"], case["gt_answers"]) == close(case["stvqa_accuracy"]), case
        assert textvqa.anls(case["pred_answer"], case["gt_answers"]) == close(case["anls"]), case


def test_textvqa_edges():
    ours = {"textvqa": textvqa.accuracy, "stvqa": textvqa.stvqa_accuracy, "stvqa_accuracy": textvqa.stvqa_accuracy, "anls": textvqa.anls}
    defined = {"ANLS_both_empty": 1.0}
    for case in cases("textvqa")["edge_cases"]:
        score = functools.partial(ours[case["evaluator"]], case["pred_answer"], case["gt_answers"])
        if not isinstance(case["result"], dict):
            assert score() == close(case["result"]), case
        elif case["tag"] in defined:
            assert score() == defined[case["tag"]]
        else:
            with pytest.raises((DataError, ValueError)):
                score()


def test_textvqa_prompts():
    for case in cases("textvqa")["prompt_processor_cases"]:
        if isinstance(case["question"], str):
            assert textvqa.question_of(case["prompt"]) == case["question"], case
        else:
            with pytest.raises(DataError, match="expected a question and a line"):
                textvqa.question_of(case["prompt"])


# ---- POPE, MME -----------------------------------------------------------------------------------------------------------------------------------------


def same_rates(ours: dict, official: dict) -> bool:
    percent = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1", "yes_share": "yes_ratio"}
    counts = all(ours[name] == official[name] for name in ("TP", "FP", "TN", "FN"))
    return counts and all(ours[name] == close(100 * official[theirs]) for name, theirs in percent.items())


def test_pope():
    splits = cases("pope")["splits"]
    items = [(split, item) for split, found in splits.items() for item in found["items"]]
    assert [pope.parse(item["text"]) for _, item in items] == [item["parsed"] for _, item in items]
    questions = [Question(item["question_id"], item["question"], truth=item["label"], group=split) for split, item in items]
    scores = pope.score(questions, [item["text"] for _, item in items]).scores
    for split, found in splits.items():
        assert same_rates(scores["splits"][split], found["result"]), split
    assert scores["f1"] == close(sum(100 * found["result"]["f1"] for found in splits.values()) / len(splits))


def test_pope_edges():
    for case in cases("pope")["edge_cases"]:
        parsed = [pope.parse(text) for text in case["texts"]]
        assert parsed == case["parsed"]
        rates = pope.rates(parsed, case["labels"][: len(parsed)])
        if "error" not in case["result"]:
            assert same_rates(rates, case["result"]), case
        else:
            assert rates["f1"] == 0, case  # the original divides by 0


def mme_scores(folder, files: dict[str, str]):
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    questions = mme.read(folder, [])
    return mme.score(questions, [given.text for given in mme.read_answers(folder)]).scores, [mme.parse(given.text) for given in mme.read_answers(folder)]


def same_category(ours: dict, official: dict) -> bool:
    counts = all(ours[name] == official[name] for name in ("TP", "FP", "TN", "FN", "other_num"))
    return counts and ours["score"] == close(official["score"]) and all(ours[n] == close(100 * official[n]) for n in ("acc", "acc_plus", "precision", "recall"))


def test_mme(tmp_path):
    for i, found in enumerate(cases("mme")["sets"]):
        scores, _ = mme_scores(tmp_path / str(i), found["files"])
        assert (scores["perception"], scores["cognition"]) == (close(found["result"]["perception"]), close(found["result"]["cognition"]))
        for name, official in found["result"]["categories"].items():
            assert same_category(scores["categories"][name], official), name


def test_mme_parses():
    for case in cases("mme")["parse_cases"]:
        assert mme.parse(case["raw"]) == case["parsed"] == mme.parse(case["lowered_with_newline"]), case


def test_mme_edges(tmp_path):
    for i, case in enumerate(cases("mme")["edge_cases"]):
        if "error" in case["result"]:
            with pytest.raises(DataError):
                mme_scores(tmp_path / str(i), case["replaced"])
        else:
            scores, parsed = mme_scores(tmp_path / str(i), case["replaced"])
            assert parsed == case["result"]["category"]["parsed_predictions"]
            assert same_category(*scores["categories"].values(), case["result"]["category"]), case


# ---- GQA -----------------------------------------------------------------------------------------------------------------------------------------------

NAMES = {"per_structural_type": "accuracyPerStructuralType", "per_semantic_type": "accuracyPerSemanticType", "per_steps": "accuracyPerSteps",
         "per_words": "accuracyPerLength"}  # fmt: skip


def gqa_question(name: str, record: dict, choices: dict | None) -> Question:
    return gqa._question(Row("here", {"id": name} | record), Row("there", choices) if choices else None)


def gqa_questions(found: list[dict], with_choices: bool) -> list[Question]:
    return [
        gqa_question(case["question_id"], {
            "answer": case["answer"], "isBalanced": case["is_balanced"], "entailed": case["entailed"], "types": case["types"], "question": case["question"],
            "groups": {"global": case["group_global"]}, "semantic": [{"operation": o, "argument": a} for o, a in case["semantic"]],
        }, {"valid": case["valid"], "plausible": case["plausible"]} if with_choices else None)
        for case in found
    ]  # fmt: skip


def same_gqa(scores: dict, official: dict) -> None:
    for name in ("accuracy", "binary", "open", "validity", "plausibility", "distribution", *(["consistency"] if "consistency" in official else [])):
        assert scores[name] == close(official[name]), name
    for name, theirs in NAMES.items():
        assert scores[name].keys() == official[theirs].keys()
        for cut, pair in official[theirs].items():
            assert scores[name][cut] == close(pair), (name, cut)


def test_gqa():
    found = cases("gqa")
    said = [gqa.prediction(case["raw_prediction"]) for case in found["cases"]]
    assert said == [case["converted_prediction"] for case in found["cases"]]
    scored = gqa.score(gqa_questions(found["cases"], True), said)
    assert scored.marks == [case["correct"] for case in found["cases"]]
    same_gqa(scored.scores, found["result"])
    same_gqa(scored.scores, found["result_consistency"])
    same_gqa(gqa.score(gqa_questions(found["cases"], False), said).scores, found["result_without_choices_file"])
    some = [a if case["is_balanced"] else None for a, case in zip(said, found["cases"], strict=True)]
    scores = gqa.score(gqa_questions(found["cases"], True), some).scores
    same_gqa(scores, found["result"])
    assert scores["consistency"] is None


# ---- ScienceQA -----------------------------------------------------------------------------------------------------------------------------------------


def test_scienceqa():
    found = cases("scienceqa_parse")
    for case in found["cases"]:
        letter = scienceqa.FAILED if case["text"] is None else scienceqa.parse(case["text"])
        assert (letter, scienceqa.index_of(letter, case["n_choices"])) == (case["parsed_ans"], case["pred_index"]), case
    questions = [
        Question(c["id"], "?", truth={"answer": c["answer_index"], "num_choices": c["n_choices"], "has_image": c["is_multimodal"]}) for c in found["cases"]
    ]
    scored = scienceqa.score(questions, [case["text"] for case in found["cases"]])
    assert scored.scores["accuracy"] == close(found["acc"])
    assert scored.scores["num_correct"] == found["correct"]
    assert f"IMG-Accuracy: {scored.scores['img_accuracy']:.2f}%" in found["stdout"]
    assert scored.marks == [case["correct"] for case in found["cases"]]
