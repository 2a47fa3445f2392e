"""The trainers' networks in PyTorch, Flax NNX and Keras, and the weights that they start from."""
