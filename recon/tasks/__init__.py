"""The bundled zero-shot tasks: task files for lm-eval and the documents that they are made of."""
