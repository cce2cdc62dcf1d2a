"""Planning and world-model tasks as data: what a document is, and what a right answer is. Needs numpy alone."""

from nextlat_dist.tasks.base import Task, require_at_least, vocab_size, words_of
from nextlat_dist.tasks.catalogue import TASKS, make_task, task_class, task_names, task_of
from nextlat_dist.tasks.documents import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, PAD_ID, Document, Split, id_array

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "FIRST_SYMBOL_ID",
    "PAD_ID",
    "TASKS",
    "Document",
    "Split",
    "Task",
    "id_array",
    "make_task",
    "require_at_least",
    "task_class",
    "task_names",
    "task_of",
    "vocab_size",
    "words_of",
]
