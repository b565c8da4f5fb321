"""Measure how the loss grows around a run's weights: the curvature function H(r) of the isotropic curvature model.

    python -m scripts.curvature --run runs/nanogpt/stdlib/olion-lr8e-3-s1337
    python -m scripts.curvature --run RUN --steps 0 400 800 --directions 8 --out images/curvature.png
    python -m scripts.curvature --run images/curvature.json      # the table and figure again, from the record alone

The model (Su, arXiv 2511.00674) replaces f(W + Q) - f(W) - <G, Q> by E H(||Q zeta||), zeta uniform on the unit sphere.
For Q = r D with ||D u|| = 1 for every unit u this is H(r) itself, so that

    H(r) = mean over D of (f(W + r D) + f(W - r D)) / 2 - f(W)

with D uniform among the matrices of orthonormal columns; the two signs cancel <G, Q> and every other odd order. A wide
D (m < n) cannot keep all lengths and keeps them on average: ||D u||^2 is 1 up to sqrt(2 (n / m - 1) / (n + 2)). f is
the loss of one batch of the validation set. It is measured for each matrix alone, and for all at once with one r.

Numbers are float64. The rounding of f(W + r D) is measured where r is 1e-12 to 1e-11, and H is used where it is 100
times as large, so to 1 % or better. Exponents are slopes of log H against log r, with the standard error that leaving
out one direction after the other gives (jackknife); fits end where H is saturated, its local slope being below 1.
A loss that is smooth at W has exponent 2 and a plateau of H(r) / r^2 for small r. The model asks whether H becomes
steeper before it saturates, so the steepest decade is reported beside the fit of all.
"""
