"""The exported forms of a network, in the runtimes that read them."""
