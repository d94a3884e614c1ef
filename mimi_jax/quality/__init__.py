"""How good decoded audio is, in numbers and in pictures.

The measures compare decoded audio with the original. No module here needs training code.

    metrics      SI-SDR, STOI and ViSQOL
    scoring      these measures, in worker processes
    spectrum     the mel scale, spectrograms, and the mel distance between two clips
    evaluation   all measures for each number of codebooks
    picture      pictures of a clip before and after the codec, and of an evaluation
"""
