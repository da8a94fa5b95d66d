"""The tasks that jaxlm brings, registered by name. They need no download and no trained vocabulary."""

from jaxlm.data.sources import LibraryText, StandardLibrary
from jaxlm.data.tasks import register, text_task
from jaxlm.data.vocabularies import STANDARD_TOKENS, ByteVocabulary, PythonVocabulary

register(text_task("python_stdlib", StandardLibrary(), PythonVocabulary()))
register(text_task("python_stdlib_english", StandardLibrary(LibraryText.ENGLISH), PythonVocabulary()))
register(text_task("python_stdlib_code", StandardLibrary(LibraryText.CODE), PythonVocabulary()))
register(text_task("python_stdlib_bytes", StandardLibrary(), ByteVocabulary(named_tokens=STANDARD_TOKENS)))
