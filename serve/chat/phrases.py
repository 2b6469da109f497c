"""What the terminal says, in English and in Spanish. What a daemon says comes as it is, in English."""

import os
from collections.abc import Iterable, Mapping

from serve.errors import closest

LANGUAGES = ("en", "es")

PHRASES: dict[str, tuple[str, str]] = {
    # What commands are for, by their names.
    "/help": ("show this", "mostrar esto"),
    "/quit": ("leave (so does Ctrl-D)", "salir (también Ctrl-D)"),
    "/reset": ("forget the turns and begin again", "olvidar los turnos y empezar de nuevo"),
    "/system": ("the text that stands before all turns; - for the run's own", "el texto que precede a todos los turnos; - para el del modelo ajustado"),
    "/set": ("how answers are sampled: /set temperature=0.7 seed=1", "cómo se muestrea: /set temperature=0.7 seed=1"),
    "/params": ("how answers are sampled now", "cómo se muestrea ahora"),
    "/regenerate": ("another answer to the last question", "otra respuesta a la última pregunta"),
    "/undo": ("take back the last question and its answer", "deshacer la última pregunta y su respuesta"),
    "/edit": ("change the last question and ask again", "cambiar la última pregunta y repetirla"),
    "/adapter": ("who answers from now on", "quién responde a partir de ahora"),
    "/adapters": ("who can answer", "quién puede responder"),
    "/compare": ("the last question, answered by several; alone: by base and who answers", "la última pregunta, a varios; solo: a base y a quien responde"),
    "/stats": ("figures of the last answer", "cifras de la última respuesta"),
    "/save": ("give this conversation a name", "dar nombre a esta conversación"),
    "/load": ("begin a new conversation with what another one holds", "empezar una conversación nueva con el contenido de otra"),
    "/resume": ("go on with a conversation; without a name: list them", "continuar una conversación; sin nombre: listarlas"),
    "/export": ("write it as x.md, or add it to x.jsonl for make train DATA=", "escribirla como x.md, o añadirla a x.jsonl para make train DATA="),
    "/copy": ("the last answer to the clipboard; /copy code: its last block", "la última respuesta al portapapeles; /copy code: su último bloque"),
    "/file": ("put a file in front of the next question", "anteponer un archivo a la próxima pregunta"),
    "/status": ("what the daemon is doing", "qué está haciendo el demonio"),
    # Keys.
    "Ctrl-C": ("stop the answer, keep what came of it", "parar la respuesta y conservar lo recibido"),
    "Alt-Enter": ("a new line in the question", "una línea nueva en la pregunta"),
    "Ctrl-X Ctrl-E": ("write the question in $EDITOR", "escribir la pregunta en $EDITOR"),
    "Up, Ctrl-R": ("earlier questions, also those of other days", "preguntas anteriores, también de otros días"),
    # Lines.
    "help_hint": ("/help shows the commands, Ctrl-D leaves.", "/help muestra los comandos, Ctrl-D sale."),
    "leave_hint": ("Ctrl-D or /quit leaves.", "Ctrl-D o /quit para salir."),
    "interrupted": ("[interrupted]", "[interrumpida]"),
    "unknown": ("{word}: unknown command; {hint} Try /help. With a blank in front it is a question", "{word}: comando desconocido; {hint} Prueba /help. Con un espacio delante es una pregunta"),
    "takes_nothing": ("{name} takes nothing after it; try {name}", "{name} no lleva nada detrás; prueba {name}"),
    "needs": ("{name} needs {what}; try {example}", "{name} necesita {what}; prueba {example}"),
    "forgotten": ("The turns are forgotten.", "Los turnos se han olvidado."),
    "system_is": ("system: {text}", "sistema: {text}"),
    "system_own": ("system: {text} (as it was trained; /system TEXT puts another in its place)", "sistema: {text} (como fue entrenado; /system TEXTO pone otro en su lugar)"),
    "no_system": ("There is no system text; try /system Answer in one sentence.", "No hay texto de sistema; prueba /system Responde en una frase."),
    "params_are": ("{values}", "{values}"),
    "no_params": ("Greedy: the likeliest token each time. Try /set temperature=0.7", "Voraz: siempre el token más probable. Prueba /set temperature=0.7"),
    "nothing_asked": ("Nothing was asked yet; try a question first.", "Aún no se ha preguntado nada; prueba con una pregunta."),
    "undone": ("Taken back: {question}", "Deshecho: {question}"),
    "answers_now": ("{name} answers from now on.", "{name} responde a partir de ahora."),
    "no_stats": ("There was no answer yet; try a question first.", "Aún no hubo respuesta; prueba con una pregunta."),
    "saved": ("This conversation is {name} now; go on with it: /resume {name}", "Esta conversación se llama {name}; para continuarla: /resume {name}"),
    "loaded": ("{exchanges} from {name}, in a new conversation.", "{exchanges} de {name}, en una conversación nueva."),
    "resumed": ("{name}: {exchanges}. The last question: {question}", "{name}: {exchanges}. La última pregunta: {question}"),
    "no_conversations": ("No conversation is kept yet.", "Aún no hay conversaciones guardadas."),
    "unanswered": ("This question was not answered; Enter asks it: {question}", "Esta pregunta quedó sin respuesta; Enter la hace: {question}"),
    "resumed_here": ("{name} is the conversation that is open here: {exchanges}.", "{name} es la conversación abierta aquí: {exchanges}."),
    "adapter_gone": ("{gone} is not here; {name} answers from now on.", "{gone} no está aquí; {name} responde a partir de ahora."),
    "exchanges": ("{number} exchange|{number} exchanges", "{number} intercambio|{number} intercambios"),
    "exported": ("written: {path}", "escrito: {path}"),
    "conversations": ("{number} conversation|{number} conversations", "{number} conversación|{number} conversaciones"),
    "trains": ("{path} holds {conversations}; learn from them: make train DATA={quoted} RUN=second", "{path} contiene {conversations}; para aprender de ellas: make train DATA={quoted} RUN=second"),
    "trains_not": ("{path} holds {conversations}, and a training takes {least}; export another to the same file", "{path} contiene {conversations}, y un entrenamiento necesita {least}; exporta otra al mismo archivo"),
    "not_conversations": ("{path}:{line}: no conversation for a training; try another name", "{path}:{line}: no es una conversación para entrenar; prueba otro nombre"),
    "not_regular": ("{path}: not a regular file; try another path", "{path}: no es un archivo normal; prueba otra ruta"),
    "file_exists": ("{path} is there already; try another name", "{path} ya existe; prueba otro nombre"),
    "export_ending": ("{path}: ends in neither .md nor .jsonl; try {path}.md", "{path}: no termina en .md ni en .jsonl; prueba {path}.md"),
    "copied": ("Copied: {number} character.|Copied: {number} characters.", "Copiado: {number} carácter.|Copiado: {number} caracteres."),
    "sent": ("Sent to the terminal's clipboard: {number} character.|Sent to the terminal's clipboard: {number} characters.", "Enviado al portapapeles del terminal: {number} carácter.|Enviado al portapapeles del terminal: {number} caracteres."),
    "no_clipboard": ("no program here can copy, and this terminal gets no escapes; try /export talk.md", "ningún programa puede copiar aquí, y este terminal no recibe escapes; prueba /export talk.md"),
    "copy_what": ("/copy takes code or nothing; try /copy code", "/copy admite code o nada; prueba /copy code"),
    "no_code": ("The last answer has no code block; try /copy", "La última respuesta no tiene bloque de código; prueba /copy"),
    "attached": ("{path} goes in front of the next question.", "{path} irá delante de la próxima pregunta."),
    "compare_two": ("/compare takes two or more; try /compare {names}", "/compare necesita dos o más; prueba /compare {names}"),
    "compare_merged": (
        "{name} is merged into its base, so the base is not beside it. Try /quit, make stop RUN={run}, make chat RUN={run} HOLD=adapters, and there /resume",
        "{name} está fundido con su base, así que la base no está al lado. Prueba /quit, make stop RUN={run}, make chat RUN={run} HOLD=adapters, y allí /resume",
    ),
    "compare_merged_there": (
        "{name} is merged into its base, so the base is not beside it. Try on {host}: make stop, and make serve with HOLD=adapters",
        "{name} está fundido con su base, así que la base no está al lado. Prueba en {host}: make stop, y make serve con HOLD=adapters",
    ),
    "compare_again": (
        "{name} is merged into its base, so the base is not beside it. The daemon can be started again with both: that takes some seconds, and answers come a little slower then.",
        "{name} está fundido con su base, así que la base no está al lado. El demonio puede arrancarse de nuevo con ambos: tarda unos segundos, y las respuestas llegan después algo más despacio.",
    ),
    "cut_off": ("{number} other client is connected, and would be cut off.|{number} other clients are connected, and would be cut off.", "Hay {number} cliente más conectado, y se quedaría sin conexión.|Hay {number} clientes más conectados, y se quedarían sin conexión."),
    "choose_again": ("  r      start it again with both\n  Enter  leave it", "  r      arrancarlo de nuevo con ambos\n  Enter  dejarlo así"),
    "compare_failed": (
        "the daemon does not start with both: {text}. The conversation is kept, and the next question starts it as it was",
        "el demonio no arranca con ambos: {text}. La conversación se conserva, y la próxima pregunta lo arranca como estaba",
    ),
    "compare_alone": ("only {name} is here; try make load ADAPTER= with the folder of a run", "solo está {name}; prueba make load ADAPTER= con la carpeta de un entrenamiento"),
    "kept": ("The answer of {name} is kept.", "Se conserva la respuesta de {name}."),
    "status": ("{busy} of {slots} slots busy, {waiting} waiting; {turns} in this conversation ({name})", "{busy} de {slots} ranuras ocupadas, {waiting} en espera; {turns} en esta conversación ({name})"),
    # Context.
    "too_long": ("{have} tokens, and {max} are there: this question does not fit with all before it.", "{have} tokens, y caben {max}: esta pregunta no cabe con todo lo anterior."),
    "far_too_long": ("{number} characters, and {max} tokens are there: this question does not fit with all before it.", "{number} caracteres, y caben {max} tokens: esta pregunta no cabe con todo lo anterior."),
    "oldest": ("the oldest exchange|the oldest {number} exchanges", "el intercambio más antiguo|los {number} intercambios más antiguos"),
    "choose": (
        "  d      leave out {exchanges}\n  s      and put your own summary there\n  Enter  do not ask",
        "  d      dejar fuera {exchanges}\n  s      y poner tu resumen en su lugar\n  Enter  no preguntar",
    ),
    "too_long_alone": ("Even alone this question does not fit; try a shorter one.", "Ni siquiera sola cabe esta pregunta; prueba una más corta."),
    "your_summary": ("Your summary of what is left out, on one line:", "Tu resumen de lo que se deja fuera, en una línea:"),
    "dropped": (
        "{number} exchange is no longer sent; the system text stays.|{number} exchanges are no longer sent; the system text stays.",
        "{number} intercambio ya no se envía; el texto de sistema se queda.|{number} intercambios ya no se envían; el texto de sistema se queda.",
    ),
    "not_asked": ("Not asked.", "No se ha preguntado."),
    "num_tokens": ("{number} token|{number} tokens", "{number} token|{number} tokens"),
    "also_here": ("also here", "también aquí"),
    "answer_full": ("the context is full; /reset begins again", "el contexto está lleno; /reset empieza de nuevo"),
    # What is wrong with a conversation, a file, a value or a flag.
    "none_kept": ("no conversation is kept yet; try: make chat", "aún no hay conversaciones guardadas; prueba: make chat"),
    "several_begin": ("{name} is the beginning of {count} conversations; choose from: {names}", "{name} es el comienzo de {count} conversaciones; elige entre: {names}"),
    "no_conversation": ("no conversation {name}; {hint}", "no hay ninguna conversación {name}; {hint}"),
    "no_beginning": ("{path}:1: not the beginning of a conversation; try another one", "{path}:1: no es el comienzo de una conversación; prueba otra"),
    "newer": ("{path}:{line}: {fault}, from a newer Afinar; try to update this one", "{path}:{line}: {fault}, de un Afinar más nuevo; prueba a actualizar este"),
    "damaged": ("{path}:{line}: damaged ({fault}); try: {keep}, and resume {name}", "{path}:{line}: dañado ({fault}); prueba: {keep}, y continúa {name}"),
    "conversation_fault": ("{path}: {fault}; try another conversation", "{path}: {fault}; prueba otra conversación"),
    "open_elsewhere": ("{name} is open in another terminal; try to leave it there first", "{name} está abierta en otro terminal; prueba a salir allí primero"),
    "no_name": ("{name!r} cannot be a name; try up to 60 letters, digits and - _ . with a letter first", "{name!r} no puede ser un nombre; prueba hasta 60 letras, cifras y - _ . con una letra al principio"),
    "name_taken": ("{name} is taken; try another name", "{name} ya existe; prueba otro nombre"),
    "not_renamed": ("{path}: {fault}; it is still {name}, try again", "{path}: {fault}; sigue siendo {name}, prueba otra vez"),
    "unsaved": (
        "{path}: {fault}; the conversation goes on unsaved: make room, the next turn tries again",
        "{path}: {fault}; la conversación sigue sin guardarse: haz sitio, el próximo turno lo intenta otra vez",
    ),
    "nothing_to_learn": ("no answer that came to its end, so there is nothing to learn; try to ask first", "ninguna respuesta llegó a su fin, así que no hay nada que aprender; prueba a preguntar primero"),
    "export_fault": ("{path}: {fault}; try another path", "{path}: {fault}; prueba otra ruta"),
    "nul_in_path": ("{path}: no path has a NUL in it; try another one", "{path}: ninguna ruta contiene un NUL; prueba otra"),
    "no_regular_text": ("{path}: not a regular file; try the path of a text file", "{path}: no es un archivo normal; prueba la ruta de un archivo de texto"),
    "text_fault": ("{path}: {fault}; try the path of a text file", "{path}: {fault}; prueba la ruta de un archivo de texto"),
    "text_too_large": ("{path}: larger than {most} MiB; try a part of it: head -c 100000 {path}", "{path}: más de {most} MiB; prueba una parte: head -c 100000 {path}"),
    "text_not_utf8": ("{path}: not UTF-8 (byte {byte}); try: iconv -t utf-8", "{path}: no es UTF-8 (byte {byte}); prueba: iconv -t utf-8"),
    "open_quote": ('a quote is not closed; try stop="a b"', 'falta cerrar unas comillas; prueba stop="a b"'),
    "not_a_pair": ("{word}: not name=value; {hint} Try temperature=0.7", "{word}: no es nombre=valor; {hint} Prueba temperature=0.7"),
    "bad_value": ("{word}: {fault}; try {name}= to leave it out", "{word}: {fault}; prueba {name}= para quitarlo"),
    "unknown_flag": ("{flag}: unknown; {hint} Try: python -m serve chat {help}", "{flag}: desconocido; {hint} Prueba: python -m serve chat {help}"),
    "flag_needs": ("{flag}: {what} must follow; try {example}", "{flag}: falta {what} detrás; prueba {example}"),
    "flag_takes_nothing": ("{word}: takes no value; try {flag}", "{word}: no lleva valor; prueba {flag}"),
    "flag_not_utf8": ("{flag}: not UTF-8; try {example}", "{flag}: no es UTF-8; prueba {example}"),
    "did_you_mean": ("did you mean {name}?", "¿quisiste decir {name}?"),
    "choose_from": ("choose from: {names}", "elige entre: {names}"),
    # What is wrong with a pipe.
    "stdout_closed": ("stdout is closed, nobody would see the answer; try: ... > answer.txt", "stdout está cerrado, nadie vería la respuesta; prueba: ... > answer.txt"),
    "stdin_too_large": ("more than {most} MiB came on stdin; try a shorter text", "llegaron más de {most} MiB por stdin; prueba un texto más corto"),
    "stdin_not_utf8": ("stdin is not UTF-8 (byte {byte}); try: iconv -t utf-8", "stdin no es UTF-8 (byte {byte}); prueba: iconv -t utf-8"),
    "stdin_empty": ("nothing came on stdin; try: echo hello | make -s chat", "no llegó nada por stdin; prueba: echo hola | make -s chat"),
    "answer_unwritten": ("the answer cannot be written: {fault}; try another file or disk", "no se puede escribir la respuesta: {fault}; prueba otro archivo o disco"),
    # The daemon comes and goes.
    "looking": ("Looking for a daemon; Ctrl-C stops looking. To start one: make serve", "Buscando un demonio; Ctrl-C deja de buscar. Para arrancar uno: make serve"),
    "ending": ("ending the daemon", "parando el demonio"),
    "starting": ("starting the daemon", "arrancando el demonio"),
    "back": ("Connected again. Enter asks again.", "Conectado de nuevo. Enter vuelve a preguntar."),
    "connected": ("Connected: {what}", "Conectado: {what}"),
    # The toolbar.
    "tokens": ("{used}/{context} tokens", "{used}/{context} tokens"),
    "rate": ("{rate} tokens/s", "{rate} tokens/s"),
    "queued": ("in the queue behind {number}", "en cola detrás de {number}"),
    "reading": ("reading {done}/{total}", "leyendo {done}/{total}"),
    "answering": ("answering; Ctrl-C stops", "respondiendo; Ctrl-C para"),
    "lost": ("no daemon", "sin demonio"),
    "lines_wait": ("{number} line waits|{number} lines wait", "{number} línea en espera|{number} líneas en espera"),
    "files_wait": ("{number} file attached|{number} files attached", "{number} archivo adjunto|{number} archivos adjuntos"),
    "undone_lines": ("{number} line that waited was left undone.|{number} lines that waited were left undone.", "{number} línea en espera quedó sin hacer.|{number} líneas en espera quedaron sin hacer."),
    "error": ("error: {text}", "error: {text}"),
}  # fmt: skip


def language(environment: Mapping[str, str] = os.environ) -> str:
    """`en` or `es`: AFINAR_LANG, else the locale of messages."""
    for name in ("AFINAR_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := environment.get(name):
            return value[:2].lower() if value[:2].lower() in LANGUAGES else LANGUAGES[0]
    return LANGUAGES[0]


def say(phrase: str, **values: object) -> str:
    """A phrase in the user's language; where it is about a `number` and has two forms, the one for it."""
    text = PHRASES[phrase][LANGUAGES.index(language())]
    if "number" in values:
        one, *more = text.split("|")
        text = more[0] if more and values["number"] != 1 else one
    return text.format(**values)


def hint(name: str, valid: Iterable[str]) -> str:
    """`serve.errors.nearest`, in the user's language."""
    choices = list(valid)
    close = closest(name, choices)
    return say("did_you_mean", name=close) if close else say("choose_from", names=", ".join(choices))
