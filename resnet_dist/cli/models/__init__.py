"""Commands that use a trained model.

evaluate  evaluate
predict   predict
explain   explain
export    export
serve     serve
register  the model that --register of several commands names
"""
