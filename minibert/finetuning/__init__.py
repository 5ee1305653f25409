"""Fine-tuning of a task head, or of an encoder of sentences, on labelled files.

`command` asks, `options` checks, `files`, `examples`, `conll` and `squad` read, `tasks`, `question_answering` and
`sentence_pairs` say what is learnt and how good it is (`scores`, `schemes`, `answers`), `start` makes the model and
`loop` trains it.
"""
