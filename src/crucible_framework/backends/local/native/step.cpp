// A whole step of a frozen Llama- or Qwen-like decoder for some tokens of several sequences, each with its own adapter: token ids in,
// logits out. Keys and values are written into pages in place. Called from Python; the structures are those of native.py.
#include "attention.h"

struct Layer {
    const float *before, *between, *heads;  // norms; heads: [queries + keys][size] or null
    Matrix qkv, out, up, down;
};
struct Part { int32_t low, high, first, last; };  // ranks low..high act on outputs first..last
struct Pair {                                     // an adapter on one matrix; ranks 0 where there is none
    const void *a, *b;                            // [ranks][inputs] and [outputs / 16][ranks][16], scaled, of the adapter's kind
    int32_t ranks, parts;
    Part part[3];
};
struct Model {
    int32_t layers, queries, keys, size, width, inner, vocabulary, kind, cache_kind;
    float eps;
    const void* embedding;
    int32_t embedding_kind, adapter_kind;
    const float* norm;
    Matrix head;
    const Layer* layer;
};
struct Step {
    int32_t tokens, sequences, rows, groups, table_width, heads_room;
    const int32_t *ids, *places, *starts, *table;  // starts: [sequences + 1]; table: [sequences][table_width]
    const int32_t* last;                           // [rows]: the tokens whose logits are asked
    const int32_t* stops;                          // [groups]: where each group of tokens with one adapter ends
    const Pair* const* adapters;                   // [groups]: [layers * 4 + 1], or null for the base
    const float *cos, *sin;                        // [places][size / 2]
    char* pool;
    int64_t layer_bytes, page_bytes;
    float* logits;                                 // [rows][vocabulary]
};
enum Mode { PUT, ADD, GATE };

class Engine {
  public:
    Engine(const Model& model, int threads) : model_(model), layers_(model.layer, model.layer + model.layers), team_(threads), scratch_(threads) {}
    void step(const Step& step) {
        s_ = &step;
        prepare();
        team_.run([this](int id) { work(scratch_[id]); });
    }
    void draw(const float* logits, int rows, int vocabulary, const float* inverse, const double* uniform, int64_t* tokens, float* logprobs) {
        team_.run([&](int) {
            for (int r; (r = team_.next()) < rows;) draw_row(logits + (size_t)r * vocabulary, vocabulary, inverse[r], uniform[r], tokens[r], logprobs[r]);
        });
    }

  private:
    struct Group { int from, to; const Pair* pairs; };
    struct Piece { int sequence, from, to, head, first, last; };  // tokens from..to of a sequence, a key-value head, its query heads first..last

    void prepare() {
        const Step& s = *s_;
        const int t = (s.tokens + 15) / 16 * 16, qkv = (model_.queries + 2 * model_.keys) * model_.size;
        auto grow = [](Array<float>& v, size_t n) { if (v.size() < n) v.resize(n); };
        grow(x_, (size_t)t * (model_.width + 32));
        grow(qkv_, (size_t)t * (qkv + 32));
        grow(o_, (size_t)t * (model_.queries * model_.size + 32));
        grow(gated_, (size_t)t * (model_.inner + 32));
        groups_.clear();
        // What is left of a prompt whose start is known already is still read as the whole was, so that it says the same.
        few_ = s.tokens == s.sequences ? 8 : 4;
        adapted_ = false;
        int most = 0;
        for (int g = 0, from = 0; g < s.groups; from = s.stops[g++]) {
            groups_.push_back({from, s.stops[g], s.adapters[g]});
            if (s.adapters[g] == nullptr) continue;
            adapted_ = true;
            for (int i = 0; i < model_.layers * 4 + 1; i++) most = std::max(most, s.adapters[g][i].ranks);
        }
        last_groups_.clear();
        for (int r = 0, g = 0; r < s.rows; r++) {
            while (g + 1 < (int)groups_.size() && s.last[r] >= groups_[g].to) g++;
            if (!last_groups_.empty() && last_groups_.back().pairs == groups_[g].pairs) last_groups_.back().to = r + 1;
            else last_groups_.push_back({r, r + 1, groups_[g].pairs});
        }
        ranks_ = (most + 31) / 32 * 32;
        grow(low_, (size_t)t * ranks_);
        int widest = std::max({model_.width, model_.inner, model_.queries * model_.size});
        for (auto& one : scratch_) {
            grow(one.c, (size_t)t * 32);
            if (one.panel.size() < (size_t)32 * (widest + 32)) one.panel.resize((size_t)32 * (widest + 32)), one.wide.resize((size_t)32 * (widest + 32));
        }
        pieces_.clear();
        const int shared = model_.queries / model_.keys, many = std::max(1, 12 / shared);
        const bool split = s.tokens * model_.keys < 4 * team_.count();
        for (int q = 0; q < s.sequences; q++)
            for (int from = s.starts[q]; from < s.starts[q + 1]; from += many)
                for (int head = 0; head < model_.keys; head++)
                    for (int first = 0; first < shared; first += split ? 1 : shared)
                        pieces_.push_back({q, from, std::min(from + many, s.starts[q + 1]), head, head * shared + first, head * shared + (split ? first + 1 : shared)});
    }

    void work(Scratch& scratch) {
        const Step& s = *s_;
#ifdef HAVE_AMX
        if (model_.kind != FLOAT32 && allow_tiles()) open_tiles();
#endif
        const Pages pages{s.pool, s.layer_bytes, s.page_bytes, model_.keys, model_.size, s.heads_room};
        for (int t; (t = team_.next()) < s.tokens;) embed(s.ids[t], &x_[(size_t)t * model_.width]);
        team_.meet();
        for (int l = 0; l < model_.layers; l++) {
            const Layer& layer = layers_[l];
            const int heads = model_.queries * model_.size, qkv = heads + 2 * model_.keys * model_.size;
            enter(layer.qkv, x_.data(), s.tokens, layer.before, nullptr);
            times(layer.qkv, l * 4, groups_, qkv_.data(), qkv, PUT, scratch);
            for (int t; (t = team_.next()) < s.tokens;) turn(layer, l, t, pages);
            team_.meet();
            for (int p; (p = team_.next()) < (int)pieces_.size();) look(l, pieces_[p], pages, scratch);
            team_.meet();
            const bool end = l + 1 == model_.layers;  // where only tokens whose logits are asked go on
            const int32_t* chosen = end ? s.last : nullptr;
            const int count = end ? s.rows : s.tokens;
            if (count == 0) break;
            const std::vector<Group>& groups = end ? last_groups_ : groups_;
            enter(layer.out, o_.data(), count, nullptr, chosen);
            if (end && s.rows < s.tokens) {
                if (team_.next() == 0)  // they are in order, so that none is overwritten before it has moved
                    for (int r = 0; r < count; r++) memmove(&x_[(size_t)r * model_.width], &x_[(size_t)s.last[r] * model_.width], model_.width * sizeof(float));
                team_.meet();
            }
            times(layer.out, l * 4 + 1, groups, x_.data(), model_.width, ADD, scratch);
            enter(layer.up, x_.data(), count, layer.between, nullptr);
            times(layer.up, l * 4 + 2, groups, gated_.data(), model_.inner, GATE, scratch);
            enter(layer.down, gated_.data(), count, nullptr, nullptr);
            times(layer.down, l * 4 + 3, groups, x_.data(), model_.width, ADD, scratch);
        }
        if (s.rows > 0) {
            enter(model_.head, x_.data(), s.rows, model_.norm, nullptr);
            times(model_.head, model_.layers * 4, last_groups_, s.logits, model_.vocabulary, PUT, scratch);
        }
#ifdef HAVE_AMX
        if (model_.kind != FLOAT32 && allow_tiles()) _tile_release();
#endif
    }

    void embed(int id, float* to) {
        const int width = model_.width;
        const size_t at = (size_t)id * width;
        if (model_.embedding_kind == FLOAT32) widen((const float*)model_.embedding + at, width, to);
        else if (model_.embedding_kind == GROUPED) widen((const Affine*)model_.embedding + at / 32, width, to);
        else widen((const uint16_t*)model_.embedding + at, width, to);
    }

    // Rows of activations for a matrix: normed where there is a norm, and of the chosen rows only where `chosen` is given.
    void enter(const Matrix& matrix, const float* x, int count, const float* norm, const int32_t* chosen) {
        const int width = matrix.inputs;
        const int first = team_.next();
        if (first == 0) {  // the one who comes first; the others wait
            const Way way = way_of(matrix.kind, count, width, few_);
            rows_.set(way, count, width, by_bytes_too(matrix, way), adapted_);
        }
        team_.meet();
        const int each = rows_.blocks() ? 16 : 1;
        Array<float>& normed = buffer();
        normed.resize(width);
        for (int p; (p = team_.next()) * each < count;) {
            for (int row = p * each; row < std::min(count, (p + 1) * each); row++) {
                const float* from = x + (size_t)(chosen ? chosen[row] : row) * width;
                if (norm) {
                    Vec squares = {};
                    float rest = 0;
                    int d = 0;
                    for (; d + 16 <= width; d += 16) { Vec v = load(from + d); squares += v * v; }
                    for (int j = d; j < width; j++) rest += from[j] * from[j];
                    const float r = 1.0f / std::sqrt((sum(squares) + rest) / width + model_.eps);
                    for (d = 0; d + 16 <= width; d += 16) store(&normed[d], load(from + d) * r * load(norm + d));
                    for (; d < width; d++) normed[d] = from[d] * r * norm[d];
                    from = normed.data();
                }
                rows_.put(row, from, !keeps_fp32(matrix.kind));
            }
            if (rows_.blocks()) rows_.pack(p);
        }
        team_.meet();
    }

    static Array<float>& buffer() {
        static thread_local Array<float> mine;
        return mine;
    }

    // y = (matrix and adapters) times the rows; put, added to y, or gated: silu of the first half times the second.
    void times(const Matrix& m, int which, const std::vector<Group>& groups, float* y, int stride, Mode mode, Scratch& scratch) {
        if (adapted_) lower(m, which, groups, scratch);
        const int half = m.outputs / 2, count = rows_.count;
        const int pieces = mode == GATE ? half / 16 : (m.outputs + 31) / 32;
        for (int p; (p = team_.next()) < pieces;) {
            const int at[2] = {mode == GATE ? p * 16 : p * 32, mode == GATE ? half + p * 16 : p * 32 + 16};
            product(m, at[0], at[1], rows_, 0, count, scratch);
            float* c = scratch.c.data();
            for (int n = 0; n < 2; n++) {
                if (at[n] >= m.outputs) continue;
                if (m.scale || m.bias)
                    for (int r = 0; r < count; r++) {
                        Vec v = load(c + r * 32 + n * 16);
                        if (m.scale) v *= load(m.scale + at[n]);
                        if (m.bias) v += load(m.bias + at[n]);
                        store(c + r * 32 + n * 16, v);
                    }
                if (adapted_) higher(which, groups, at[n], mode == GATE ? 16 : 32, c + n * 16);
            }
            if (mode == GATE) {
                for (int r = 0; r < count; r++) {
                    Vec g = load(c + r * 32), u = load(c + r * 32 + 16);
                    store(y + (size_t)r * stride + p * 16, g / (1.0f + exp16(-g)) * u);
                }
                continue;
            }
            for (int n = 0; n < 2; n++) {
                const int many = std::min(16, m.outputs - at[n]);
                for (int r = 0; r < count && many > 0; r++) {
                    float *to = y + (size_t)r * stride + at[n], *from = c + r * 32 + n * 16;
                    if (many == 16) store(to, mode == ADD ? load(to) + load(from) : load(from));
                    else for (int j = 0; j < many; j++) to[j] = mode == ADD ? to[j] + from[j] : from[j];
                }
            }
        }
        team_.meet();
    }

    // low[row][rank]: the adapters' first matrices.
    void lower(const Matrix& m, int which, const std::vector<Group>& groups, Scratch& scratch) {
        int all_pieces = 0;
        for (auto& group : groups) all_pieces += group.pairs ? (group.pairs[which].ranks + 31) / 32 : 0;
        for (int p; (p = team_.next()) < all_pieces;) {
            int left = p;
            for (auto& group : groups) {
                const int here = group.pairs ? (group.pairs[which].ranks + 31) / 32 : 0;
                if (left >= here) { left -= here; continue; }
                const Pair& pair = group.pairs[which];
                const Matrix a{pair.a, nullptr, nullptr, nullptr, pair.ranks, m.inputs, model_.adapter_kind};
                product(a, left * 32, left * 32 + 16, rows_, group.from, group.to, scratch);
                for (int r = group.from; r < group.to; r++)
                    memcpy(&low_[(size_t)r * ranks_ + left * 32], &scratch.c[(size_t)r * 32], 32 * sizeof(float));
                break;
            }
        }
        team_.meet();
    }

    // Adds the adapters' second matrices to the 16 outputs from `first` on; those of `ahead` outputs further are asked for meanwhile.
    void higher(int which, const std::vector<Group>& groups, int first, int ahead, float* c) {
        const size_t item = model_.adapter_kind == FLOAT32 ? sizeof(float) : sizeof(uint16_t);
        for (auto& group : groups) {
            if (!group.pairs) continue;
            const Pair& pair = group.pairs[which];
            for (int i = 0; i < pair.parts; i++) {
                const Part& part = pair.part[i];
                const size_t block = (size_t)pair.ranks * 16 * item;
                const char* b = (const char*)pair.b + first / 16 * block + part.low * 16 * item;
                if (part.last > first + ahead && part.first < first + ahead + 16)
                    for (size_t n = 0; n < (part.high - part.low) * 16 * item; n += 64) __builtin_prefetch(b + ahead / 16 * block + n);
                if (part.last <= first || part.first >= first + 16) continue;
                if (model_.adapter_kind == FLOAT32) raise((const float*)b, part, group, c);
                else raise((const uint16_t*)b, part, group, c);
            }
        }
    }
    template <class T> void raise(const T* b, const Part& part, const Group& group, float* c) {
        int r = group.from;
        for (; r + 4 <= group.to; r += 4) raise<T, 4>(b, part, r, c);
        for (; r < group.to; r++) raise<T, 1>(b, part, r, c);
    }
    template <class T, int R> void raise(const T* b, const Part& part, int row, float* c) {
        const float* low = &low_[(size_t)row * ranks_ + part.low];
        Vec v[R];
        for (int i = 0; i < R; i++) v[i] = load(c + (row + i) * 32);
        for (int k = 0; k < part.high - part.low; k++) {
            const Vec one = load(b + k * 16);
            for (int i = 0; i < R; i++) v[i] += one * low[(size_t)i * ranks_ + k];
        }
        for (int i = 0; i < R; i++) store(c + (row + i) * 32, v[i]);
    }

    // Norms and turns a token's queries and keys, and remembers its keys and values.
    void turn(const Layer& layer, int l, int t, const Pages& pages) {
        const Step& s = *s_;
        const int size = model_.size, half = size / 2, heads = model_.queries + model_.keys;
        float* x = &qkv_[(size_t)t * (heads + model_.keys) * size];
        const float *cos = s.cos + (size_t)s.places[t] * half, *sin = s.sin + (size_t)s.places[t] * half;
        const float scale = 1.0f / std::sqrt((float)size);
        for (int h = 0; h < heads; h++, x += size) {
            if (layer.heads) {
                float squares = 0;
                for (int d = 0; d < size; d++) squares += x[d] * x[d];
                const float r = 1.0f / std::sqrt(squares / size + model_.eps);
                for (int d = 0; d < size; d++) x[d] *= r * layer.heads[h * size + d];
            }
            const float by = h < model_.queries ? scale : 1.0f;
            for (int d = 0; d < half; d++) {
                const float a = x[d], b = x[d + half];
                x[d] = (a * cos[d] - b * sin[d]) * by;
                x[d + half] = (b * cos[d] + a * sin[d]) * by;
            }
        }
        const int sequence = (int)(std::upper_bound(s.starts, s.starts + s.sequences + 1, t) - s.starts) - 1;
        const int32_t* table = s.table + (size_t)sequence * s.table_width;
        const float* k = x - (size_t)model_.keys * size;
        if (model_.cache_kind == FLOAT32) remember<float>(pages, l, table, s.places[t], k, x);
        else remember<uint16_t>(pages, l, table, s.places[t], k, x);
    }

    void look(int l, const Piece& piece, const Pages& pages, Scratch& scratch) {
        const Step& s = *s_;
        const int size = model_.size, qkv = (model_.queries + 2 * model_.keys) * size;
        const float* q[64];
        float* to[64];
        int lengths[64], count = 0;
        for (int t = piece.from; t < piece.to; t++)
            for (int h = piece.first; h < piece.last; h++, count++) {
                q[count] = &qkv_[(size_t)t * qkv + h * size];
                to[count] = &o_[((size_t)t * model_.queries + h) * size];
                lengths[count] = s.places[t] + 1;
            }
        const int32_t* table = s.table + (size_t)piece.sequence * s.table_width;
        if (model_.cache_kind == FLOAT32) attend<float>(pages, l, table, piece.head, count, q, lengths, to, scratch);
        else attend<uint16_t>(pages, l, table, piece.head, count, q, lengths, to, scratch);
    }

    // One token: the likeliest where `uniform` is negative, else where the distribution function passes it; NaN as log-prob where logits are not finite.
    static void draw_row(const float* z, int count, float inverse, double uniform, int64_t& token, float& logprob) {
        const int whole = count / 16 * 16;
        Vec top = all(-INFINITY), zero = {};
        for (int i = 0; i < whole; i += 16) { Vec v = load(z + i); top = larger(top, v); zero += v * 0.0f; }
        float most = highest(top), check = sum(zero);
        for (int i = whole; i < count; i++) most = std::max(most, z[i]), check += z[i] * 0.0f;
        if (!(check == 0)) { token = 0; logprob = NAN; return; }
        auto chunk = [&](int from, int to) {
            double total = 0;
            Vec part = {};
            int i = from;
            for (; i + 16 <= to; i += 16) part += exp16((load(z + i) - most) * inverse);
            total = sum(part);
            for (; i < to; i++) total += exp16(all((z[i] - most) * inverse))[0];
            return total;
        };
        const int each = 512;
        double total = 0;
        for (int i = 0; i < count; i += each) total += chunk(i, std::min(i + each, count));
        int found = 0;
        if (uniform < 0) {
            while (z[found] != most) found++;
        } else {
            const double point = std::min(uniform * total, std::nextafter(total, 0.0));
            double before = 0, here;
            int from = 0;
            while (from + each < count && before + (here = chunk(from, from + each)) <= point) before += here, from += each;
            const int end = std::min(from + each, count);
            found = end - 1;
            for (int i = from, likely = from; i < end; i++) {
                const float mass = exp16(all((z[i] - most) * inverse))[0];
                if (mass > 0) likely = i;
                before += mass;
                if (before > point) { found = i; break; }
                found = likely;
            }
        }
        token = found;
        logprob = (float)((double)(z[found] - most) * inverse - std::log(total));
    }

    const Model model_;
    const std::vector<Layer> layers_;
    Team team_;
    std::vector<Scratch> scratch_;
    Rows rows_;
    const Step* s_ = nullptr;
    bool adapted_ = false;
    int ranks_ = 0, few_ = 4;
    Array<float> x_, qkv_, o_, gated_, low_;
    std::vector<Group> groups_, last_groups_;
    std::vector<Piece> pieces_;
};

extern "C" {
void* crucible_open(const Model* model, int threads) { return new Engine(*model, threads); }
void crucible_close(void* engine) { delete (Engine*)engine; }
void crucible_step(void* engine, const Step* step) { ((Engine*)engine)->step(*step); }
void crucible_draw(void* engine, const float* logits, int rows, int vocabulary, const float* inverse, const double* uniform, int64_t* tokens, float* logprobs) {
    ((Engine*)engine)->draw(logits, rows, vocabulary, inverse, uniform, tokens, logprobs);
}
}
