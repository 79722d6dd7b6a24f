"""`python -m keras_tp` is the command `keras-tp`."""

from keras_tp.cli import main

if __name__ == "__main__":
    main()
