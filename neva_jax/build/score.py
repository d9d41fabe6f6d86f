"""evaluation.*: the questions that a run asks of its own weights, and how their answers are scored."""

import functools
import json
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image

from neva_jax.build.data import build_encoder, build_examples
from neva_jax.build.model import image_processor
from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.data.prompt import Processor
from neva_jax.errors import UserError
from neva_jax.evaluation import asking, show
from neva_jax.evaluation.page import page
from neva_jax.evaluation.question import Given, Question
from neva_jax.evaluation.tasks import TASKS, scored
from neva_jax.inference.generate import GRAIN
from neva_jax.models.multimodal import NevaConfig


def build_score(config: ConfigDict, tokenizer, neva_config: NevaConfig):
    """-> (generate, run) -> {name: number}, which asks evaluation.questions; None where there are none. generate: see exact_match.answer. run: None, or
    where evaluation.json and answers.png go. What is wrong with the questions is an error now."""
    e = config.evaluation
    if not e.questions:
        return None
    if e.task == "exact_match":
        examples = build_examples(config, tokenizer, neva_config, e.questions)
        examples.media = asking.open_pictures(e.image_folder) if e.image_folder else examples.media
        return lambda generate, run: show.evaluate(run, generate, examples, batch_size=e.batch_size, max_new_tokens=e.max_new_tokens)
    missing = [path for path in (e.questions, *(e.annotations or ())) if not Path(path).exists()]
    if missing:
        raise UserError(f"evaluation.{'questions' if missing[0] == e.questions else 'annotations'}: there is no {missing[0]}")
    questions = TASKS[e.task].module.read(Path(e.questions), [Path(path) for path in e.annotations or ()], split="test")
    TASKS[e.task].check(questions)
    if untold := [question for question in questions if question.truth is None]:
        raise UserError(f"evaluation.annotations: nobody tells the truth of {untold[0].where}; name the files of {e.task} that do")
    folder = e.image_folder or config.model.data.image_folder
    try:
        media = asking.open_folder(folder, questions)
    except UserError as error:
        raise UserError(str(error).replace("--image_folder", "evaluation.image_folder")) from None
    processor = Processor(build_encoder(config, tokenizer, neva_config), image_processor(config), neva_config.media_length, neva_config.llm.vocab_size)
    return functools.partial(_score, e, questions, processor, media)


def _score(e: ConfigDict, questions: list[Question], processor: Processor, media, generate, run: Path | None) -> dict[str, float]:
    task, texts = TASKS[e.task], [""] * len(questions)
    prompts = [f"{PLACEHOLDER}\n" * len(q.images) + asking.prompt_of(q, task.module.SUFFIX) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(prompts[i])))
    for chosen in asking.batches(order, e.batch_size):
        pictures = [[asking.picture(media, names, questions[i]) for names in questions[i].images] for i in chosen]
        asked = [processor.read(prompts[i], given, questions[i].where) for i, given in zip(chosen, pictures, strict=True)]
        length = -(-max(len(prompt.ids) for prompt in asked) // GRAIN) * GRAIN
        for i, text in zip(chosen, generate(processor.batch(asked, e.batch_size, length), e.max_new_tokens), strict=False):
            texts[i] = text
    result = scored(e.task, questions, [Given(str(q.id), text, prompt) for q, text, prompt in zip(questions, texts, prompts, strict=True)])
    if run:
        (run / "evaluation.json").write_text(json.dumps(result, indent=1))
        said, marks, truths = ([row[name] for row in result["answers"]] for name in ("answer", "mark", "truth"))
        Image.fromarray(page(questions, said, marks, truths, media)).save(run / "answers.png")
    return {"num_questions": len(questions)} | dict(_numbers(result["scores"]))


def _numbers(scores: dict, prefix: str = ""):
    """Numbers of nested scores, by names with slashes."""
    for name, value in scores.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
