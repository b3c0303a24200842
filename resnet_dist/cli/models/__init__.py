"""Commands that use a trained model.

predict   predict, export
evaluate  evaluate
serve     serve
"""
