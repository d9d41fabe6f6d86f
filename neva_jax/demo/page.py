"""The page: a chat with pictures, and beside it the model's facts and the sampling. Gradio draws it; its reports home are off, its fonts are its own.

Gives up: Markdown in answers. What the model said is shown as it said it, and text can draw in no picture from elsewhere.
"""

import html
import os
from pathlib import Path

from neva_jax.demo.chat import MAX_PICTURES, answerer, show
from neva_jax.errors import UserError

MAX_WAITING = 16  # questions; more are refused
MAX_CHATS = 256  # kept at once, the oldest are forgotten
CSS = """
footer, #chat .top-panel, #chat .message-buttons-right {display: none !important}
#chat .image-frame img {min-width: 6rem; min-height: 6rem; max-height: 14rem; object-fit: contain; border-radius: 6px}
#chat .message.component {display: inline-block; width: auto; vertical-align: top; margin: 0 .5rem 0 0 !important}
#chat .md {white-space: pre-wrap}
.gradio-container {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
#about h1 {font-size: 1.25rem; font-weight: 700; margin: 0 0 .6rem}
#about dl {display: grid; grid-template-columns: auto 1fr; gap: .2rem .9rem; margin: 0; font-size: .85rem}
#about dt {color: var(--body-text-color-subdued)}
#about dd {margin: 0; overflow-wrap: anywhere}
"""


def load_gradio():
    """-> the module, which must not report home: that is said before its first import. Raises UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError(f'the page needs gradio, which is not installed ({error}); run pip install -e ".[demo]"') from None
    return gradio


def look() -> dict:
    """What mount_gradio_app and launch take besides the page itself."""
    gr = load_gradio()
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"  # served by Gradio itself
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", radius_size="md", font=font)
    return {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False}


def build(vlm, name: str = "a vision-language model"):
    """vlm (neva_jax.from_pretrained) -> gr.Blocks. name: what the page calls it. While the page runs, leave the model to it: its calls must not overlap.
    Raises UserError for a model without a tokenizer or a template, which can be asked nothing in words."""
    gr = load_gradio()
    if vlm.processor.encoder is None:
        raise UserError(vlm.processor.lacking)
    answer = answerer(vlm)
    with gr.Blocks(title=f"{name} · neva_jax", analytics_enabled=False, fill_height=True, delete_cache=(600, 3600)) as page:
        turns = gr.State([], time_to_live=3600)
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=360):
                chat = gr.Chatbot(
                    show_label=False, height="70vh", layout="bubble", render_markdown=False, allow_tags=False, buttons=[], feedback_options=None,
                    allow_file_downloads=False, placeholder="Add a picture, or several, and ask.", elem_id="chat",
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    show_label=False, file_types=["image"], file_count="multiple", sources=["upload"], placeholder="Ask about the picture", autofocus=True,
                    max_plain_text_length=10**6, elem_id="question",
                )  # fmt: skip
                box.async_move_resource_to_block_cache = only_uploads(gr, box.async_move_resource_to_block_cache)
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", scale=0, min_width=110, elem_id="stop")
                    clear = gr.Button("Clear", size="sm", scale=0, min_width=110, elem_id="clear")
            with gr.Column(scale=3, min_width=260):
                gr.Markdown(about(vlm, name), elem_id="about")
                controls = sampling(gr, vlm)

        async def ask(message, past, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed):
            options = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
            options |= {"top_k": int(top_k), "max_new_tokens": int(max_new_tokens), "seed": int(seed or 0)}
            async for now in answer(message["text"] or "", message["files"], past, options):
                yield None, show(now), now

        asked = box.submit(ask, [box, turns, *controls], [box, chat, turns], api_name="ask", show_progress="hidden", concurrency_limit=1)
        stop.click(None, cancels=[asked], queue=False, api_visibility="private")
        clear.click(lambda: (None, [], []), None, [box, chat, turns], cancels=[asked], queue=False, api_visibility="private")
    page.state_session_capacity = MAX_CHATS
    return page.queue(max_size=MAX_WAITING, api_open=False)


def about(vlm, name: str) -> str:
    height, width = vlm.processor.image_processor.crop_size
    facts = {"template": vlm.processor.encoder.template, "length": f"{vlm.max_length} tokens", "pictures": f"{width} x {height}, at most {MAX_PICTURES}"}
    rows = "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return f"<h1>{html.escape(name)}</h1><dl>{rows}</dl>"


def sampling(gr, vlm) -> list:
    """-> the controls, drawn where this is called, in the order that the page's handler takes them."""
    longest = min(vlm.max_length, 2048)
    return [
        gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)"),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p (1: all)"),
        gr.Slider(0, 200, 0, step=1, label="Top k (0: all)"),
        gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty"),
        gr.Slider(1, longest, min(512, longest // 2), step=1, label="Longest answer, in tokens"),
        gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed"),
    ]


def only_uploads(gr, store):
    """What a textbox does with each file of a question, but for uploads alone: no address is fetched, and no other file of this machine is read. Gradio
    itself checks that only in a page that `launch` started."""

    async def checked(path):
        folder = Path(gr.utils.get_upload_folder()).resolve()
        if path is not None and not Path(path).resolve().is_relative_to(folder):
            raise gr.Error("A picture must be uploaded; addresses and other files are not read.", print_exception=False)
        return await store(path)

    return checked
