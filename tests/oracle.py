"""Algorithms 2 and 3 of the paper, literally, loop by loop, in NumPy float64.

No import from the package. Indices and symbols are the paper's; where the paper is silent
(no bias, a single row, strides) the rule stands beside the loop that carries it out.
"""

import math

import numpy as np


def algorithm_2(H, G_w, G_b, mu, sigma2, rho=0.99, eps_1=1e-2, eps_2=1e-4):
  """Return G_w, G_b, mu, sigma2 of one dense step: H[N, n], G_w[m, n], G_b[m] or None."""
  H = np.asarray(H, np.float64)
  N, n = H.shape
  return _algorithm(
    columns=[[H[i, j] for i in range(N)] for j in range(n)],
    rows=N,
    G_w=np.asarray(G_w, np.float64).T[None],
    G_b=G_b,
    mu=mu,
    sigma2=sigma2,
    q2=max(n / N, 1.0),
    rho=rho,
    eps_1=eps_1,
    eps_2=eps_2,
  )


def algorithm_3(
  h, positions, G_w, G_b, mu, sigma2, rho=0.99, eps_1=1e-2, eps_2=1e-4, examples=None
):
  """Return one step of a convolution: h[N, *space, c], G_w[*window, c, d] and G_b[d] (or None).

  `positions` is the number of output positions (the paper's r s); `examples` is N, where it is not
  the first axis of h. A dense layer over time is a convolution with a window of one.
  """
  h = np.asarray(h, np.float64)
  c = h.shape[-1]
  N = h.shape[0] if examples is None else examples
  columns = [[] for _ in range(c)]
  for index in np.ndindex(*h.shape[:-1]):
    for p in range(c):
      columns[p].append(h[(*index, p)])
  G_w = np.asarray(G_w, np.float64)
  window = math.prod(G_w.shape[:-2])
  G_w, G_b, mu, sigma2 = _algorithm(
    columns=columns,
    rows=N * positions,
    G_w=G_w.reshape(window, *G_w.shape[-2:]),
    G_b=G_b,
    mu=mu,
    sigma2=sigma2,
    q2=max(c * window / N, math.sqrt(positions)),
    rho=rho,
    eps_1=eps_1,
    eps_2=eps_2,
  )
  return G_w, G_b, mu, sigma2


def _algorithm(columns, rows, G_w, G_b, mu, sigma2, q2, rho, eps_1, eps_2):
  """Take steps 1 to 5 with G_w[window, feature, output] and one column of inputs per feature."""
  window, n, m = G_w.shape
  mu, sigma2 = list(map(float, mu)), list(map(float, sigma2))
  G_w = np.array(G_w, np.float64)
  bias = G_b is not None
  G_b = np.array(G_b, np.float64) if bias else np.zeros(m)

  for j in range(n):
    count = len(columns[j])
    # 1. Mean and variance of the mini-batch. Without a bias: no mean, the second moment.
    mean = math.fsum(columns[j]) / count if bias else 0.0
    variance = math.fsum((x - mean) ** 2 for x in columns[j]) / count
    # 2. Running statistics. With a single row, the variance is about the running mean.
    mu[j] = rho * mu[j] + (1 - rho) * mean
    if rows == 1 and bias:
      variance = math.fsum((x - mu[j]) ** 2 for x in columns[j]) / count
    sigma2[j] = rho * sigma2[j] + (1 - rho) * variance

  # 3. The regularized variance.
  largest = max(sigma2)
  tilde2 = [sigma2[j] + eps_1 * largest + eps_2 for j in range(n)]

  # 4. Update G_w.
  for k in range(window):
    for j in range(n):
      for i in range(m):
        G_w[k, j, i] = (G_w[k, j, i] - mu[j] * G_b[i]) / tilde2[j] / q2

  # 5. Update G_b, with the G_w of step 4.
  for i in range(m):
    G_b[i] = G_b[i] / q2 - math.fsum(mu[j] * G_w[k, j, i] for k in range(window) for j in range(n))

  return G_w, (G_b if bias else None), np.array(mu), np.array(sigma2)


def explicit_matrices(mu, sigma2, window, q2, eps_1=1e-2, eps_2=1e-4):
  """Return P / q of eqs. (12) and (23) as a matrix on [b, w], w in order (window, feature)."""
  mu, sigma2 = np.asarray(mu, np.float64), np.asarray(sigma2, np.float64)
  tilde = np.sqrt(sigma2 + eps_1 * sigma2.max() + eps_2)
  size = 1 + window * len(mu)
  U, D = np.eye(size), np.eye(size)
  U[0, 1:] = -np.tile(mu, window)
  D[1:, 1:] = np.diag(1 / np.tile(tilde, window))
  return U @ D / math.sqrt(q2)
