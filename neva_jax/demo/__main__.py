"""A page to try a model: python -m neva_jax.demo --model PATH, then open http://127.0.0.1:7860; control-C ends it. A chat with pictures.

It listens on this machine only. --host 0.0.0.0 opens it to others and needs a token of 16 characters or more: --token, or NEVA_DEMO_TOKEN, which other
users of the machine cannot see. A browser asks for it as a password, for any user name; programs send the header "Authorization: Bearer TOKEN".
One answer is made at a time, 16 questions wait, and more are refused. Nothing is loaded from elsewhere and nothing is reported.
"""

import logging
import os
from pathlib import Path

from absl import flags

import neva_jax
from neva_jax import cli
from neva_jax.demo.page import load_gradio
from neva_jax.demo.server import check_token, listen, serve

logger = logging.getLogger(__name__)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("model", None, "a run of ours, a Hugging Face directory, a .nemo file or directory", flag_values=values, required=True)
    flags.DEFINE_string("conv_template", None, "instead of the model's own", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "for a model that has none in it", flag_values=values)
    flags.DEFINE_multi_string("base", [], "a model that has what this one lacks, such as the tower of a .nemo; may be repeated", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "of weights and computation (default: bfloat16 on a GPU, else float32)", flag_values=values)
    flags.DEFINE_integer("tensor_parallel", 1, "devices that share each weight", lower_bound=1, flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; one that others can reach needs a token", flag_values=values)
    flags.DEFINE_integer("port", 7860, "port to listen on; 0: any that is free", lower_bound=0, upper_bound=65535, flag_values=values)
    flags.DEFINE_string("token", None, "what every request must know; better said in NEVA_DEMO_TOKEN", flag_values=values)


def main(*, model, host, port, token, base, **how) -> None:
    token = token if token is not None else os.environ.get("NEVA_DEMO_TOKEN") or None
    token = None if token is None else check_token(token)
    load_gradio()
    with listen(host, port, token) as sock:  # before the weights: a port that is taken is said at once
        logger.info("loading %s", model)
        serve(neva_jax.from_pretrained(model, bases=base, **how), Path(model).resolve().name, sock, token)


if __name__ == "__main__":
    cli.run(main, define_flags, with_config=False)
