"""Holds the embedded backend's worlds, which make captions, pictures and questions with known answers.

Both are modules, `shapes.world` (plain shapes on a grid) and `scenes.world` (drawn scenes), with the same names:

    STYLES                                        the styles of its captions, as `embedded:STYLE:COUNT` names them
    captions(count, seed, style)                  yields captions
    owns(request)                                 whether a request is about this world
    drawable(caption)                             whether a caption can be drawn
    describe(request, schema, seed)               the answer to `describe`, and the sample's state
    ask(request, schema, seed)                    pairs of question and answer, each with its topic where there is one
    statements(pairs, request)                    each question with its answer as one statement
    verify(question, answer, request)             whether an answer is right
    draw(description, request, size, seed)        a picture, RGB of size (width, height)

`request` is the structured request of `backends/base.py`, `schema` the answer's JSON schema. Requests that cannot be
answered raise `Unusable`.
"""
