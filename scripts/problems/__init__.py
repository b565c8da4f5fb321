"""Small matrix problems on which optimizers are compared in a minute each: python -m scripts.problems.

    python -m scripts.problems                       # quadratic, logistic, completion: tables, images/problems_*.png
    python -m scripts.problems quadratic --steps 500 --seeds 0 1 2 3 4
    python -m scripts.problems isotropy              # where OLion falls behind Muon: images/problems_isotropy.png

    quadratic     f(X) = 1/2 ||A X B - C||^2 / L                       strongly convex; Newton's method is exact
    logistic      f(X) = sum log(1 + exp(-C * (A X B))) / L            convex, labels C of +-1
    completion    f(X, Y) = 1/2 ||mask * (X Y' - M)||^2 / ||mask * M||^2     M of low rank, not convex
    isotropy      quadratics whose gradients lose diagonal isotropy by design, from Haar to the worst case

as in Lau, Long and Su, "PolarGrad", arXiv 2505.21799, at sizes for a CPU; gradients are exact, in float64. L scales the
gradient's Lipschitz constant, or a bound of it, to 1. Each optimizer is this repository's, without weight decay, at its
best rate of a grid of powers of two, once with a fixed rate and once with geometric decay to 1/1000 of it.
"""
