// One epoch of training: equations 1 to 4 as a sparse mix of cached logits, their gradients and SGD. Included once per
// instruction set, inside a namespace of its own; no include guard and no includes for that reason.
//
// A step is bound by moving the sub-modules' second layers and their momentum (24 KB a class at H = 500, K = 5) through the
// cache. So a class is visited once a step: the update of step t and the forward of step t+1 in one pass over its state.

template <typename Acc>
struct Sgd {
  Acc lr, momentum, keep, decay;  // keep: what the momentum takes of a new gradient
  Acc of_gradient, of_momentum;   // the step is of_gradient * gradient + of_momentum * momentum
};

template <typename Acc>
static ALPHAEXT_INLINE Sgd<Acc> sgd_of(const SgdParams& params, bool first_step) {
  const bool undampened = first_step || params.momentum == 0;
  return {static_cast<Acc>(params.lr),
          static_cast<Acc>(params.momentum),
          undampened ? Acc(1) : static_cast<Acc>(1 - params.dampening),
          static_cast<Acc>(params.weight_decay),
          params.nesterov ? Acc(1) : Acc(0),
          params.nesterov ? static_cast<Acc>(params.momentum) : Acc(1)};
}

// One SGD update of `value`. kPlain: without weight decay, dampening and Nesterov.
template <typename Acc, bool kPlain, typename Value>
static ALPHAEXT_INLINE void sgd_update(const Sgd<Acc>& sgd, Value gradient, Value& value, Value& momentum) {
  if (kPlain) {
    momentum = sgd.momentum * momentum + gradient;
    value = value - sgd.lr * momentum;
  } else {
    gradient = gradient + sgd.decay * value;
    momentum = sgd.momentum * momentum + sgd.keep * gradient;
    value = value - sgd.lr * (sgd.of_gradient * gradient + sgd.of_momentum * momentum);
  }
}

// The outputs, less b2, of one class's network: raw[k] = sum_h w2[k, h] relu(c[h]). With kUpdate after an SGD step with the
// gradient `grad_raw` of the outputs before. kMembers is M, or 0 for any.
template <typename Acc, int kMembers, bool kUpdate, bool kPlain>
static inline void visit_class(Acc* state, int64_t tiles, int64_t any_members, const Acc* grad_raw, Acc scale,
                               const Sgd<Acc>& sgd, Acc* raw, Acc* workspace) {
  using V = Vector<Acc>;
  constexpr int kW = static_cast<int>(kTileWidth);
  const int64_t members = kMembers > 0 ? kMembers : any_members;
  V local[kMembers > 0 ? kMembers : 1];
  V gradients[kMembers > 0 ? kMembers : 1];
  for (int k = 0; k < kMembers; ++k) {
    local[k] = V{};
    if (kUpdate) gradients[k] = all(grad_raw[k]);
  }
  if (kMembers == 0) {
    for (int64_t k = 0; k < members; ++k) store(workspace + k * kW, V{});
  }
  for (int64_t t = 0; t < tiles; ++t, state += (2 + 2 * members) * kW) {
    Acc* const w2 = state + 2 * kW;
    Acc* const w2_momentum = w2 + members * kW;
    for (int lane = 0; lane < kW; lane += kLanes<Acc>) {
      V c = load(state + lane);
      V hidden = relu_of<Acc>(c);
      V next = hidden;
      if (kUpdate) {
        V delta{};
        for (int64_t k = 0; k < members; ++k) {
          delta += (kMembers > 0 ? gradients[k] : all(grad_raw[k])) * load(w2 + k * kW + lane);
        }
        // ReLU passes no gradient at or below 0, and a NaN stays visible.
        delta = c <= V{} ? V{} : scale * delta;
        V momentum = load(state + kW + lane);
        sgd_update<Acc, kPlain>(sgd, delta, c, momentum);
        store(state + lane, c);
        store(state + kW + lane, momentum);
        next = relu_of<Acc>(c);
      }
      for (int64_t k = 0; k < members; ++k) {
        V weight = load(w2 + k * kW + lane);
        if (kUpdate) {
          V momentum = load(w2_momentum + k * kW + lane);
          const V gradient = (kMembers > 0 ? gradients[k] : all(grad_raw[k])) * hidden;
          sgd_update<Acc, kPlain>(sgd, gradient, weight, momentum);
          store(w2_momentum + k * kW + lane, momentum);
          store(w2 + k * kW + lane, weight);
        }
        if (kMembers > 0) {
          local[k] += weight * next;
        } else {
          Acc* const sum = workspace + k * kW;
          store(sum, load(sum) + weight * next);
        }
      }
    }
  }
  for (int64_t k = 0; k < members; ++k) raw[k] = lane_sum<Acc>(kMembers > 0 ? local[k] : load(workspace + k * kW));
}

// The same for one network that serves all classes. Tile by tile: the gradients of the tile's pre-activations, of all
// classes, are mixed by the Gram matrix `scale` [F, F]; those of the second layer add up over classes.
template <typename Acc, bool kUpdate>
static inline void visit_shared(Acc* state, int64_t tiles, int64_t num_few, int64_t members, const Acc* grad_raw,
                                const Acc* scale, const Sgd<Acc>& sgd, Acc* raw, Acc* workspace) {
  using V = Vector<Acc>;
  constexpr int kW = static_cast<int>(kTileWidth);
  constexpr int kVectors = kW / kLanes<Acc>;
  Acc* const sums = workspace;                        // [F, M, kW]
  Acc* const deltas = sums + num_few * members * kW;  // [F, kW]
  Acc* const grad_w2 = deltas + num_few * kW;         // [M, kW]
  for (int64_t i = 0; i < num_few * members * kW; ++i) sums[i] = 0;
  for (int64_t t = 0; t < tiles; ++t, state += (2 * num_few + 2 * members) * kW) {
    Acc* const c = state;
    Acc* const c_momentum = c + num_few * kW;
    Acc* const w2 = c_momentum + num_few * kW;
    Acc* const w2_momentum = w2 + members * kW;
    if (kUpdate) {
      for (int64_t i = 0; i < members * kW; ++i) grad_w2[i] = 0;
      for (int64_t f = 0; f < num_few; ++f) {
        for (int lane = 0; lane < kW; lane += kLanes<Acc>) {
          const V before = load(c + f * kW + lane);
          const V hidden = relu_of<Acc>(before);
          V delta{};
          for (int64_t k = 0; k < members; ++k) {
            const Acc gradient = grad_raw[f * members + k];
            Acc* const sum = grad_w2 + k * kW + lane;
            delta += gradient * load(w2 + k * kW + lane);
            store(sum, load(sum) + gradient * hidden);
          }
          store(deltas + f * kW + lane, before <= V{} ? V{} : delta);
        }
      }
      for (int64_t f = 0; f < num_few; ++f) {
        V gradients[kVectors];
        for (int v = 0; v < kVectors; ++v) gradients[v] = V{};
        const Acc* const row = scale + f * num_few;
        for (int64_t g = 0; g < num_few; ++g) {
          for (int v = 0; v < kVectors; ++v) gradients[v] += row[g] * load(deltas + g * kW + v * kLanes<Acc>);
        }
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = f * kW + v * kLanes<Acc>;
          V value = load(c + at), momentum = load(c_momentum + at);
          sgd_update<Acc, false>(sgd, gradients[v], value, momentum);
          store(c + at, value);
          store(c_momentum + at, momentum);
        }
      }
      for (int64_t i = 0; i < members * kW; i += kLanes<Acc>) {
        V value = load(w2 + i), momentum = load(w2_momentum + i);
        sgd_update<Acc, false>(sgd, load(grad_w2 + i), value, momentum);
        store(w2 + i, value);
        store(w2_momentum + i, momentum);
      }
    }
    for (int64_t f = 0; f < num_few; ++f) {
      for (int lane = 0; lane < kW; lane += kLanes<Acc>) {
        const V hidden = relu_of<Acc>(load(c + f * kW + lane));
        for (int64_t k = 0; k < members; ++k) {
          Acc* const sum = sums + (f * members + k) * kW + lane;
          store(sum, load(sum) + load(w2 + k * kW + lane) * hidden);
        }
      }
    }
  }
  for (int64_t i = 0; i < num_few * members; ++i) {
    Acc sum = 0;
    for (int w = 0; w < kW; ++w) sum += sums[i * kW + w];
    raw[i] = sum;
  }
}

// The arrays of an epoch, typed, and its scratch.
template <typename Acc>
struct Epoch {
  explicit Epoch(const TrainParams& params)
      : p(params), width(rounded_up(params.batch, kTileWidth)), networks(params.shared ? 1 : params.num_few) {
    Acc* next = static_cast<Acc*>(params.workspace);
    const auto take = [&](int64_t count) {
      Acc* const here = next;
      next += rounded_up(count, kTileWidth);
      return here;
    };
    tile = take(p.columns * width);
    scores = take(p.num_few * width);
    largest = take(width), total = take(width), base = take(width), own = take(width), weight = take(width);
    grad_raw = take(p.num_few * p.members);
    by_sample = take(2 * kTileWidth * width);
    scratch = take(p.shared ? (p.num_few * p.members + p.num_few + p.members) * kTileWidth : p.members * kTileWidth);
    few = reinterpret_cast<int32_t*>(next);
    own_members = count_own_members(p.member_columns, p.num_few, p.members);
  }

  const TrainParams& p;
  const int64_t width;  // the batch, rounded up to whole vectors
  const int64_t networks;
  int64_t own_members;  // a class's first members; those behind them lie in the same columns for all classes
  Acc *tile, *scores, *largest, *total, *base, *own, *weight, *grad_raw, *by_sample, *scratch;
  int32_t* few;
};

// The batch's member logits as [U, width], so that everything after works on vectors over samples.
template <typename Acc>
static inline void gather_batch(const Epoch<Acc>& e, int64_t first, int64_t count) {
  const TrainParams& p = e.p;
  const Acc* const logits = static_cast<const Acc*>(p.member_logits);
  constexpr int kW = static_cast<int>(kTileWidth);
  for (int64_t b = 0; b < e.width; b += kW) {
    const Acc* rows[kW];
    const int64_t here = count - b < kW ? (count - b < 0 ? 0 : count - b) : kW;
    // Samples that are not there repeat the first one, with weight 0.
    for (int j = 0; j < kW; ++j) {
      const int64_t row = p.order[first + (j < here ? b + j : 0)];
      rows[j] = logits + row * p.columns;
      e.base[b + j] = static_cast<const Acc*>(p.base_logsumexp)[row];
      e.own[b + j] = static_cast<const Acc*>(p.label_logit)[row];
      e.few[b + j] = p.few_of_label[row];
      e.weight[b + j] = j < here ? Acc(1) / static_cast<Acc>(count) : Acc(0);
    }
    constexpr int kL = kLanes<Acc>;
    const int64_t whole = p.columns / kL * kL;
    for (int64_t u = 0; u < whole; u += kL) {
      for (int j = 0; j < kW; j += kL) {
        Vector<Acc> square[kL];
        for (int i = 0; i < kL; ++i) square[i] = load(rows[j + i] + u);
        transpose<Acc>(square);
        for (int i = 0; i < kL; ++i) store(e.tile + (u + i) * e.width + b + j, square[i]);
      }
    }
    for (int64_t u = whole; u < p.columns; ++u) {
      Acc* const out = e.tile + u * e.width + b;
      for (int j = 0; j < kW; ++j) out[j] = rows[j][u];
    }
  }
}

// The loss of the batch, and in e.scores its gradient with respect to the few scores.
template <typename Acc>
static inline double loss_and_gradient(const Epoch<Acc>& e, int64_t count) {
  using V = Vector<Acc>;
  const TrainParams& p = e.p;
  const Acc* const offsets = static_cast<const Acc*>(p.few_offset);
  const int64_t width = e.width;
  for (int64_t b = 0; b < width; ++b) e.largest[b] = e.base[b];
  constexpr int kL = kLanes<Acc>;
  int64_t done = 0;
  const auto mix = [&](auto vectors) {
    mix_few<Acc, decltype(vectors)::value>(e.tile + done, width, p.member_columns, static_cast<const Acc*>(p.alpha), p.num_few,
                                           p.members, e.own_members, e.scores + done, width, [] {});
  };
  for (; done + 4 * kL <= width; done += 4 * kL) mix(Count<4>{});
  for (; done < width; done += kL) mix(Count<1>{});
  for (int64_t f = 0; f < p.num_few; ++f) {
    Acc* const row = e.scores + f * width;
    const Acc offset = offsets ? offsets[f] : Acc(0);
    for (int64_t b = 0; b < width; b += kL) {
      const V before = load(e.largest + b), score = load(row + b) + offset;
      store(row + b, score);
      store(e.largest + b, score > before ? score : before);
    }
  }
  for (int64_t b = 0; b < count; ++b) {
    if (e.few[b] >= 0) e.own[b] = e.scores[e.few[b] * width + b];
  }
  for (int64_t b = 0; b < width; b += kLanes<Acc>) {
    store(e.total + b, exponential<Acc>(load(e.base + b) - load(e.largest + b)));
  }
  for (int64_t f = 0; f < p.num_few; ++f) {
    Acc* const row = e.scores + f * width;
    for (int64_t b = 0; b < width; b += kLanes<Acc>) {
      const V value = exponential<Acc>(load(row + b) - load(e.largest + b));
      store(row + b, value);
      store(e.total + b, load(e.total + b) + value);
    }
  }
  double loss = 0;
  for (int64_t b = 0; b < count; ++b) {
    loss += static_cast<double>(e.largest[b]) + std::log(static_cast<double>(e.total[b])) - static_cast<double>(e.own[b]);
  }
  if (!std::isfinite(loss)) return loss;  // before a NaN in the total reaches the scores of all classes
  for (int64_t b = 0; b < width; b += kLanes<Acc>) store(e.total + b, load(e.weight + b) / load(e.total + b));
  for (int64_t f = 0; f < p.num_few; ++f) {
    Acc* const row = e.scores + f * width;
    for (int64_t b = 0; b < width; b += kLanes<Acc>) store(row + b, load(row + b) * load(e.total + b));
  }
  for (int64_t b = 0; b < count; ++b) {
    if (e.few[b] >= 0) e.scores[e.few[b] * width + b] -= e.weight[b];
  }
  return loss;
}

// The gradients of class f's own members k to k + kColumns.
template <typename Acc, int kColumns>
static ALPHAEXT_INLINE void own_gradients(const Epoch<Acc>& e, int64_t f, int64_t k) {
  using V = Vector<Acc>;
  const int32_t* const columns = e.p.member_columns + f * e.p.members + k;
  const Acc* const scores = e.scores + f * e.width;
  const Acc* logits[kColumns];
  for (int i = 0; i < kColumns; ++i) logits[i] = e.tile + columns[i] * e.width;
  V sums[kColumns] = {};
  for (int64_t b = 0; b < e.width; b += kLanes<Acc>) {
    const V score = load(scores + b);
    for (int i = 0; i < kColumns; ++i) sums[i] += score * load(logits[i] + b);
  }
  const V found = lane_sums<Acc, kColumns>(sums);
  for (int i = 0; i < kColumns; ++i) e.grad_raw[f * e.p.members + k + i] = found[i];
}

// The gradients of the members from own_members on, which are common to all classes: a product of matrices, for kVectors
// vectors of classes from f on.
template <typename Acc, int kVectors>
static inline void common_gradients(const Epoch<Acc>& e, int64_t f) {
  using V = Vector<Acc>;
  constexpr int kL = kLanes<Acc>, kClasses = kVectors * kL, kColumns = ALPHAEXT_VECTOR_BYTES == 64 ? 8 : 4;
  const TrainParams& p = e.p;
  // The classes' scores sample by sample: [width, kClasses].
  for (int v = 0; v < kVectors; ++v) {
    for (int64_t b = 0; b < e.width; b += kL) {
      V square[kL] = {};
      for (int i = 0; i < kL && f + v * kL + i < p.num_few; ++i) square[i] = load(e.scores + (f + v * kL + i) * e.width + b);
      transpose<Acc>(square);
      for (int i = 0; i < kL; ++i) store(e.by_sample + (b + i) * kClasses + v * kL, square[i]);
    }
  }
  const auto gradients = [&](auto columns, int64_t k) {
    constexpr int kHere = decltype(columns)::value;
    const Acc* logits[kHere];
    for (int i = 0; i < kHere; ++i) logits[i] = e.tile + p.member_columns[k + i] * e.width;
    V sums[kHere][kVectors] = {};
    for (int64_t b = 0; b < e.width; ++b) {
      V scores[kVectors];
      for (int v = 0; v < kVectors; ++v) scores[v] = load(e.by_sample + b * kClasses + v * kL);
      for (int i = 0; i < kHere; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] += logits[i][b] * scores[v];
      }
    }
    Acc found[kHere][kClasses];
    std::memcpy(found, sums, sizeof(found));
    for (int64_t c = 0; c < kClasses && f + c < p.num_few; ++c) {
      for (int i = 0; i < kHere; ++i) e.grad_raw[(f + c) * p.members + k + i] = found[i][c];
    }
  };
  int64_t k = e.own_members;
  for (; k + kColumns <= p.members; k += kColumns) gradients(Count<kColumns>{}, k);
  for (; k < p.members; ++k) gradients(Count<1>{}, k);
}

// From the gradient of the few scores to that of the sub-modules' outputs.
template <typename Acc>
static inline void coefficient_gradients(const Epoch<Acc>& e) {
  constexpr int kColumns = kLanes<Acc> < 4 ? 2 : 4;
  const TrainParams& p = e.p;
  const Acc* const penalty = static_cast<const Acc*>(p.penalty);
  const int64_t members = p.members;
  if (e.own_members < members) {
    int64_t f = 0;
    for (; f + kLanes<Acc> < p.num_few; f += 2 * kLanes<Acc>) common_gradients<Acc, 2>(e, f);
    if (f < p.num_few) common_gradients<Acc, 1>(e, f);
  }
  for (int64_t f = 0; f < p.num_few; ++f) {
    Acc* const gradients = e.grad_raw + f * members;
    int64_t k = 0;
    for (; k + kColumns <= e.own_members; k += kColumns) own_gradients<Acc, kColumns>(e, f, k);
    for (; k < e.own_members; ++k) own_gradients<Acc, 1>(e, f, k);
    const Acc* const outputs = static_cast<const Acc*>(p.raw) + f * members;
    rule_backward<Acc>(p.rule, members, outputs, gradients, gradients);
    if (!penalty) continue;
    for (k = 0; k < members; ++k) gradients[k] += penalty[k] * (outputs[k] - penalty[members + k]);
  }
}

// Fetches class f's share of the samples [first, first + count) of the epoch: their rows lie anywhere in memory, and what the
// visits stream through stays clear of it.
template <typename Acc>
static ALPHAEXT_INLINE void fetch_share(const Epoch<Acc>& e, int64_t first, int64_t count, int64_t f) {
  const int64_t bytes = e.p.columns * static_cast<int64_t>(sizeof(Acc)), lines = bytes / 64 + 1;
  const char* const logits = static_cast<const char*>(e.p.member_logits);
  const int64_t end = (f + 1) * count * lines / e.p.num_few;
  for (int64_t line = f * count * lines / e.p.num_few; line < end; ++line) {
    const int64_t at = line % lines * 64;
    __builtin_prefetch(logits + e.p.order[first + line / lines] * bytes + (at < bytes ? at : bytes - 1), 0, 2);
  }
}

// Outputs and coefficients of all classes; with kUpdate after an SGD step, while the next batch is fetched. Returns a class
// whose outputs are not finite, or -1.
template <typename Acc, bool kUpdate>
static inline int64_t visit_all(const Epoch<Acc>& e, const Sgd<Acc>& sgd, bool plain, int64_t next_first = 0,
                                int64_t next_count = 0) {
  const TrainParams& p = e.p;
  const int64_t members = p.members;
  Acc* const state = static_cast<Acc*>(p.state);
  Acc* const raw = static_cast<Acc*>(p.raw);
  Acc* const b2 = static_cast<Acc*>(p.b2);
  const Acc* const scale = static_cast<const Acc*>(p.gradient_scale);
  if (kUpdate) {
    Acc* const b2_momentum = static_cast<Acc*>(p.b2_momentum);
    if (p.shared) {
      for (int64_t k = 0; k < members; ++k) {
        Acc gradient = 0;
        for (int64_t f = 0; f < p.num_few; ++f) gradient += e.grad_raw[f * members + k];
        sgd_update<Acc, false>(sgd, gradient, b2[k], b2_momentum[k]);
      }
    } else {
      const int64_t size = p.num_few * members, whole = size / kLanes<Acc> * kLanes<Acc>;
      for (int64_t i = 0; i < whole; i += kLanes<Acc>) {
        Vector<Acc> value = load(b2 + i), momentum = load(b2_momentum + i);
        sgd_update<Acc, false>(sgd, load(e.grad_raw + i), value, momentum);
        store(b2 + i, value);
        store(b2_momentum + i, momentum);
      }
      for (int64_t i = whole; i < size; ++i) sgd_update<Acc, false>(sgd, e.grad_raw[i], b2[i], b2_momentum[i]);
    }
  }
  if (p.shared) {
    visit_shared<Acc, kUpdate>(state, p.tiles, p.num_few, members, e.grad_raw, scale, sgd, raw, e.scratch);
  } else {
    const int64_t size = p.tiles * (2 + 2 * members) * kTileWidth;
    auto* const visit = members == 6 ? (plain ? visit_class<Acc, 6, kUpdate, true> : visit_class<Acc, 6, kUpdate, false>)
                                     : (plain ? visit_class<Acc, 0, kUpdate, true> : visit_class<Acc, 0, kUpdate, false>);
    for (int64_t f = 0; f < p.num_few; ++f) {
      fetch_share(e, next_first, next_count, f);
      if (p.tiles == 0) {  // coefficients learned directly
        std::memset(raw + f * members, 0, static_cast<size_t>(members) * sizeof(Acc));
        continue;
      }
      visit(state + f * size, p.tiles, members, e.grad_raw + f * members, scale[f], sgd, raw + f * members, e.scratch);
    }
  }
  int64_t failed = -1;
  for (int64_t f = p.num_few - 1; f >= 0; --f) {
    Acc* const outputs = raw + f * members;
    const Acc* const offsets = b2 + (p.shared ? 0 : f) * members;
    const int64_t whole = members / kLanes<Acc> * kLanes<Acc>;
    Vector<Acc> not_finite{};
    for (int64_t k = 0; k < whole; k += kLanes<Acc>) {
      const Vector<Acc> value = load(outputs + k) + load(offsets + k);
      store(outputs + k, value);
      not_finite += value - value;  // NaN if one of them is not finite
    }
    Acc sum = lane_sum<Acc>(not_finite);
    for (int64_t k = whole; k < members; ++k) {
      outputs[k] += offsets[k];
      sum += outputs[k] - outputs[k];
    }
    if (!(sum == Acc(0))) failed = f;
    rule_forward<Acc>(p.rule, members, outputs, static_cast<Acc*>(p.alpha) + f * members);
  }
  return failed;
}

template <typename Acc>
static TrainResult train_epoch(const TrainParams& p) {
  const Epoch<Acc> e(p);
  const FlushDenormals flush;
  const bool plain = p.sgd.weight_decay == 0 && !p.sgd.nesterov && (p.sgd.dampening == 0 || p.sgd.momentum == 0);
  double loss = 0;
  int64_t failed = visit_all<Acc, false>(e, sgd_of<Acc>(p.sgd, p.sgd.first_step), plain);
  if (failed >= 0) return {loss, 0, failed};
  int64_t step = 0;
  for (int64_t first = 0; first < p.samples; first += p.batch, ++step) {
    const int64_t count = p.samples - first < p.batch ? p.samples - first : p.batch;
    gather_batch(e, first, count);
    const double batch_loss = loss_and_gradient(e, count);
    loss += batch_loss;
    if (!std::isfinite(batch_loss)) {
      // The class whose score was not finite has NaN here.
      for (int64_t f = 0; f < p.num_few; ++f) {
        for (int64_t b = 0; b < count; ++b) {
          if (std::isnan(e.scores[f * e.width + b])) return {loss, step, f};
        }
      }
      return {loss, step, -1};
    }
    coefficient_gradients(e);
    const int64_t next = first + count, left = p.samples - next;
    failed = visit_all<Acc, true>(e, sgd_of<Acc>(p.sgd, p.sgd.first_step && step == 0), plain, next, left < p.batch ? left : p.batch);
    if (failed >= 0) return {loss, step, failed};
  }
  return {loss, -1, -1};
}
