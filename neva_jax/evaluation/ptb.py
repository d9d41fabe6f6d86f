"""Captions as words, as COCO's caption evaluation sees them: the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1, lower-cased, without its punctuation.

Where there are Java and pycocoevalcap, that very program runs. Elsewhere its rules as we know them do: of all rules the longest match wins, the first of
those that tie. They give the same words for what captions are made of; a line of random punctuation may differ.
A rule may look at what follows the token, even across the end of a caption: "lane B." keeps its full stop unless the next caption begins with "A ".
"""

import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from neva_jax.errors import UserError

log = logging.getLogger(__name__)

JAR = "stanford-corenlp-3.4.1.jar"
DROPPED = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
LINE_ENDS = re.compile(r"[\n\r\v\f\x85\u2028\u2029]")  # to Java; in a caption one would shift all captions behind it


def tokenize(texts: list[str]) -> tuple[list[str], str]:
    """Each text's words with single spaces between, and which tokenizer it was: "stanford" or "neva_jax"."""
    texts = [LINE_ENDS.sub(" ", text).encode(errors="replace").decode() for text in texts]
    if jar := find_jar():
        return by_java(texts, jar), "stanford"
    log.warning("captions are tokenised by our own rules, as Stanford's tokenizer needs Java and pycocoevalcap; of plain captions they make the same words")
    return by_rules(texts), "neva_jax"


def find_jar() -> Path | None:
    spec = find_spec("pycocoevalcap") if shutil.which("java") else None
    jar = Path(spec.submodule_search_locations[0], "tokenizer", JAR) if spec and spec.submodule_search_locations else None
    return jar if jar and jar.exists() else None


def by_java(texts: list[str], jar: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "captions.txt")
        file.write_bytes("\n".join(texts).encode())
        options = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
        done = subprocess.run(["java", *options, str(file)], capture_output=True)
    lines = done.stdout.decode(errors="replace").split("\n")
    if done.returncode or len(lines) < len(texts):
        problem = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise UserError(f"Stanford's tokenizer failed ({problem[:200]}); repair Java, or take it off the PATH to tokenise without it")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in DROPPED) for line in lines[: len(texts)]]


# ---- rules ---------------------------------------------------------------------------------------------------------------------------------------------

def _either(words: str) -> str:
    return "|".join(words.split())


NUMERALS = "²³¹¼-¾\u2070-\u209c\u2150-\u218f\u2460-\u249b\u24ea-\u24ff\u2776-\u2793\u3007\u3021-\u3029"  # \w to Python, and no letters
LETTER = rf"(?:[^\W\d_{NUMERALS}]|[\u00ad\u0300-\u036f\u0591-\u05bd\u064b-\u0669\u0900-\u0963]|&[aeiouAEIOU](?:acute|grave|uml);)"
ALNUM = rf"(?:{LETTER}|\d)"
APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
NOT = rf"[nN](?:{APOSTROPHE}|[`\u2018\u201b])[tT]"
SHORTENED = rf"{APOSTROPHE}(?:[msdMSD]|re|ve|ll|RE|VE|LL)"
WORD = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*"
ELIDED = rf"(?:[dDoOlL]{APOSTROPHE}(?={ALNUM}{{2}}))?"  # d'Or, O'Brien
THING = rf"{ELIDED}{ALNUM}+(?:[-_\u2010\u2011]{ELIDED}{ALNUM}+)*"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])*"
HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
NUMBER = "(?:\\d*(?:[.:,\u00ad\u066b\u066c]\\d+)+|\\d+)"
SIGNED = rf"[-+]?{NUMBER}"
DIGITS, GAP = "[0-9]{2,4}", "[- \u00a0]"  # of telephone numbers, which may have spaces
AREA = rf"\([0-9]{{2,3}}\)[ \u00a0]?|\+{{0,2}}(?:{DIGITS}{GAP}){{1,2}}"
TELEPHONES = (rf"(?:{AREA})[0-9]{{3,4}}{GAP}?[0-9]{{3,5}}", rf"(?:\+{{0,2}}{DIGITS}\.)?{DIGITS}\.[0-9]{{3,4}}\.[0-9]{{3,5}}")
FRACTION = "(?:\\d{1,4}[- \u00a0])?\\d{1,4}(?:\\\\?/|\u2044)\\d{1,4}"
UNSEEN = r' \t\n\f\r"<>|'  # in an address
STOPS = r".!?(){},"  # in the name of a host, nor with a hyphen at the end of an address
ENDS = rf"[^{UNSEEN}{STOPS}-]"
WEB = (
    rf"(?i:https?)://[^{UNSEEN}()]+{ENDS}",
    rf"(?:www\.(?:[^{UNSEEN}{STOPS}]+\.)+[a-zA-Z]{{2,4}}|(?:[^{UNSEEN}`'{STOPS}-_$]+\.)+(?:com|net|org|edu))(?:/[^{UNSEEN}()]+{ENDS})?",  # ,-_: a range
)
MAILBOX = rf"[^{UNSEEN}(){{}}\u00a0"  # a class that is not closed yet
EMAIL = rf"(?:&lt;|<)?[a-zA-Z0-9]{MAILBOX}]*@(?:{MAILBOX}.]+\.)*{MAILBOX}.]+(?:&gt;|>)?"
NAME = r"[A-Za-z][A-Za-z0-9:._-]*"
QUOTED = r"['\"][^\n'\"]*['\"]"
TAG = rf"<[!?][A-Za-z-][^>\n]*>|</?{NAME}(?:[ ]+(?:{NAME}[ ]*=[ ]*{QUOTED}|{NAME}|{QUOTED})[ ]*)*[ ]*/?>"
MOUTHS, HALVES = r"[()DPdpO\\{@|\[\]]", r"[\^x=~<>'-]"  # :-) and ^_^
SMILEY = rf"[<>]?[:;=][-o*']?{MOUTHS}|{HALVES}_{HALVES}|\({HALVES}[-_.^]?{HALVES}\)"
TITLES = _either("""
adj adm adv alex asst assoc attys? ave brig capts? cf cie co?mdr col cpl dept det drs? elec ens ft gen govs? hon insp invt jos lieut lt maj mlle mme
mr mrs ms messrs msgr mt mfg mtg natl pfc ph pres profs? pvt reps? rev sens? sfc sgt spc ste? supts? v?s wm
""")
ABBREVIATIONS = _either("""
al co cos ct ga jr ky md mo rd rt sq sr va vt ala apr ariz assn aug bancorp bhd bldg blvd bros calif colo conn corp dak dec esq est etc ext feb fla
fri inc ind intl jan jul jun kans? ltd mar mich minn mon mont neb nev nov oct okla penn plc sept? seq sys tel tenn thu thurs tues? univ wed wisc? wyo
pp?t[ye]s?
""")
CAPITAL_ABBREVIATIONS = r"(?=[A-Z])(?i:az|ark|del|ill|la|mass|miss|ore|pa|tex|wash)"
BEFORE_NUMBERS = "art|bldg|ca|figs?|nos?|op|pp|prop"
OPENERS = _either("""
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr\\. Ms\\. Now Once One Other Our She Since So
Some Such That The Their Then There These They This We What When While Yet You
""")
APOSTROPHED = (
    rf"{APOSTROPHE}(?i:n){APOSTROPHE}?", rf"{APOSTROPHE}(?i:em|til|cause)", rf"(?i:ol|somethin|dunkin|[ldj]){APOSTROPHE}", rf"[yY]{APOSTROPHE}(?={LETTER})",
    rf"[A-HJ-XZn](?:{APOSTROPHE}|`){LETTER}{{2}}{LETTER}*", rf"[A-Za-z]+[aeiouyAEIOUY](?:{APOSTROPHE}|`)[aeiouA-Z][A-Za-z]*",
    rf"(?i:n?e{APOSTROPHE}er|o{APOSTROPHE}o|ev{APOSTROPHE}ry|li{APOSTROPHE}l|nat{APOSTROPHE}l|c{APOSTROPHE}mon|s{APOSTROPHE}mores|nor{APOSTROPHE}easter)",
)  # fmt: skip
QUOTES = {  # typographic ones, and how they are written
    ord(mark): plain
    for plain, marks in {"`": "\x91\u2018\u201b\u2039", "'": "\x92\u2019\u203a", "``": "\x93\xab\u201c", "''": "\x94\xbb\u201d"}.items() for mark in marks
}  # fmt: skip
QUOTATION = "".join(map(chr, QUOTES))
SYMBOLS = (
    "%&~^|\\\\+*/<>=@$¡-©¬®-´¶-¹»-¿×÷;:\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d"
    "\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2023\u2030-\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a0\u20a4\u20ac\u2100\u2101"
    "\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2153-\u215e\u2190-\u2bff"
    "\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)
RULES = [re.compile(rule) for rule in (
    TAG,
    r"(?i:(can)not|(gon|got|lem|gim|wan)(?:na|ta|me))",
    "(?i:('t)(?:is|was))",
    rf"([A-Za-z]+?){NOT}",
    rf"({WORD}){SHORTENED}",
    rf"({SHORTENED}|{NOT})[^A-Za-z]",
    "(?i:-[lr][rsc]b-)",
    *WEB,
    EMAIL,
    rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{LETTER}+",
    *APOSTROPHED,
    WORD,
    THING,
    rf"{PART}(?:\\?/{PART}){{1,2}}",
    HYPHENED,
    r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+|[cC]\+\+|[cCfF]#|whaddya|whatcha",
    r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
    SIGNED,
    *TELEPHONES,
    FRACTION,
    rf"{APOSTROPHE}(?:[2-9]0s|\d\d(?=[ \n]))",
    r"[A-Z]*\$|#+",
    rf"(?i:{TITLES}|{ABBREVIATIONS})\.|(?:{CAPITAL_ABBREVIATIONS})\.",
    rf"((?i:{ABBREVIATIONS})\.|(?:{CAPITAL_ABBREVIATIONS})\.)[\s\S]{{2}}",
    rf"{ACRONYM}\.|(?i:ed|ph)\.[dD]\.",
    rf"((?i:{BEFORE_NUMBERS})\.)[ \n]?\d",
    rf"([A-Za-z])\.[ \n](?:{OPENERS}|{TAG})[ \n]",
    rf"((?:{WORD}|{THING})\.)[,;:\u3001]",
    rf"({SMILEY})[^A-Za-z0-9]",
    "(')[A-Za-z][^ \t\n\u00a0]",
    rf"''|[`{QUOTATION}]{{1,2}}",
    r"\.{3,5}|<<|>>|[?!]+|\\?\*+|_+|-+|@+|[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+",
    r"&(?i:lt|gt|quot|amp|apos|nbsp|mdash|ndash|md);|&#\d+;",
    rf"[{SYMBOLS}\u201e\u201f]|[()\[\]{{}}]",
    ".",
)]  # fmt: skip
NAMES = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "¢": "cents", "£": "#", "¤": "$", "€": "$", "\u20a0": "$", "\x80": "$",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": "", "&apos;": "", "&nbsp;": "",
    "&mdash;": "", "&ndash;": "", "&md;": "", "\u2026": "",
}  # fmt: skip
KNOWN = re.compile(rf"[\w{SYMBOLS}\u201e\u201f()\[\]{{}}&<*!?@#/\\+=~^|$%_'.\u0092-]")
PLAIN = re.compile(r"(?!(?:cannot|gonna|gotta|lemme|gimme|wanna)[ \n])[a-z]+(?=[ \n])")  # most words of captions; no rule gives anything else
STRAIGHT = re.compile(rf"[`{QUOTATION}]+|{SHORTENED}|{NOT}")  # in all other tokens typographic apostrophes stay
PARENTHESES = re.compile(r"[()]")


def by_rules(texts: list[str]) -> list[str]:
    lines: list[list[str]] = [[]]
    for token in _tokens("\n".join(texts) + "\n"):
        if token == "\n":
            lines.append([])
        elif token and token not in DROPPED:
            lines[-1].append(token)
    return [" ".join(line) for line in lines[: len(texts)]]


def _tokens(text: str) -> Iterator[str]:
    """Tokens in lower case, "\\n" for the end of a line, and "" or a mark of DROPPED for what is dropped anyway."""
    place = 0
    while place < len(text):
        letter = text[place]
        if letter.isspace():
            if letter == "\n":
                yield letter
            place += 1
        elif found := PLAIN.match(text, place):
            yield found[0]
            place = found.end()
        else:
            token = _longest(text, place)
            yield _written(token)
            place += len(token)


def _longest(text: str, place: int) -> str:
    best, token = 0, ""
    for rule in RULES:
        if (found := rule.match(text, place)) and found.end() - place > best:
            best = found.end() - place
            kept = next((group for group in found.groups() if group), None) if rule.groups else None
            token = kept or found[0]
    return token


def _written(token: str) -> str:
    if (name := token.lower() if token[0] == "&" else token) in NAMES:
        return NAMES[name]
    if len(token) == 1 and not KNOWN.match(token):
        return ""
    token = re.sub(r"[ \u00a0]", "\u00a0", token).replace("\u00ad", "").replace("&amp;", "&").replace("&apos;", "'")
    token = token.translate(QUOTES) if STRAIGHT.fullmatch(token) else token
    if set(token) == {"."} or (set(token) == {"-"} and len(token) < 5):
        return "-"
    return PARENTHESES.sub(lambda found: NAMES[found[0]], token).lower()
