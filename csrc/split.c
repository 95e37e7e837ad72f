/* split.c -- each pattern is a chain of alternatives, tried in the order of the regular expression.  No alternative
 * looks behind, so a piece depends on what follows its begin only. */
#include "split.h"
#include "unicode.h"

typedef enum { OTHER, LETTER, NUMBER, SPACE, NOTHING } Class; /* NOTHING: the text ends here, or is not UTF-8 */

typedef struct {
    Class class;
    int size; /* bytes */
} Char;

/* The strict UTF-8 of RFC 3629: nothing longer than need be, no surrogates, nothing above U+10FFFF. */
static Char wide_char(const uint8_t *p, const uint8_t *end) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const Char nothing = {NOTHING, 0};
    int size = *p >= 0xF0 ? 4 : *p >= 0xE0 ? 3 : 2;
    if (*p < 0xC2 || *p > 0xF4 || end - p < size) return nothing;
    uint32_t code = *p & (0x7F >> size);
    for (int i = 1; i < size; i++) {
        if ((p[i] & 0xC0) != 0x80) return nothing;
        code = code << 6 | (p[i] & 0x3F);
    }
    if (code < least[size] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return nothing;
    if (code >= UNICODE_END) return (Char){OTHER, size};
    uint32_t at = unicode_index[code / UNICODE_BLOCK] * UNICODE_BLOCK + code % UNICODE_BLOCK;
    return (Char){(Class)(unicode_classes[at / 4] >> 2 * (at % 4) & 3), size};
}

static inline Char char_at(const uint8_t *p, const uint8_t *end) {
    if (p == end) return (Char){NOTHING, 0};
    if (*p < 0x80) return (Char){(Class)unicode_ascii[*p], 1};
    return wide_char(p, end);
}

/* The end of the run of this class that p is in. */
static inline const uint8_t *run(Class class, const uint8_t *p, const uint8_t *end) {
    for (;;) {
        while (p < end && *p < 0x80 && unicode_ascii[*p] == class) p++;
        if (p == end || *p < 0x80) return p;
        Char c = wide_char(p, end);
        if (c.class != class) return p;
        p += c.size;
    }
}

static int is_newline(uint8_t byte) { return byte == '\n' || byte == '\r'; }

/* \s+(?!\S)|\s+ : all of the run, or all but its last character where something stands behind it.  `stop` is its end.
 */
static const uint8_t *space(const uint8_t *p, const uint8_t *stop, const uint8_t *end) {
    if (char_at(stop, end).class == NOTHING) return stop;
    const uint8_t *last = stop - 1;
    while ((*last & 0xC0) == 0x80) last--;
    return last > p ? last : stop;
}

/* The end of what follows an apostrophe in 's 't 'm 'd 'll 've 're, or NULL.  fold: in either case. */
static const uint8_t *contraction(const uint8_t *p, const uint8_t *end, int fold) {
    if (p == end) return NULL;
    const int mask = fold ? 0x20 : 0; /* capital letters have this bit clear, small ones set */
    int a = *p | mask, b = end - p > 1 ? p[1] | mask : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 1;
    if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) return p + 2;
    if (fold && *p == 0xC5 && end - p > 1 && p[1] == 0xBF) return p + 2; /* U+017F, the long s, is an s in lower case */
    return NULL;
}

static const uint8_t *next_gpt2(const uint8_t *p, const uint8_t *end) {
    const uint8_t *stop;
    if (*p == '\'' && (stop = contraction(p + 1, end, 0))) return stop;
    Char c = char_at(p, end), second;
    if (*p == ' ' && (second = char_at(p + 1, end)).class < SPACE) return run(second.class, p + 1 + second.size, end);
    if (c.class == NOTHING) return p;
    stop = run(c.class, p + c.size, end);
    return c.class == SPACE ? space(p, stop, end) : stop;
}

static const uint8_t *digits(const uint8_t *p, const uint8_t *end) {
    Char c;
    for (int i = 0; i < 3 && (c = char_at(p, end)).class == NUMBER; i++) p += c.size;
    return p;
}

/* ' ?[^\s\p{L}\p{N}]+[\r\n]*' from behind the space */
static const uint8_t *others(const uint8_t *p, const uint8_t *end) {
    p = run(OTHER, p, end);
    while (p < end && is_newline(*p)) p++;
    return p;
}

static const uint8_t *next_gpt4(const uint8_t *p, const uint8_t *end) {
    const uint8_t *stop;
    if (*p == '\'' && (stop = contraction(p + 1, end, 1))) return stop;
    Char c = char_at(p, end);
    if (c.class == LETTER) return run(LETTER, p + c.size, end);
    if (c.class == NUMBER) return digits(p, end);
    if (c.class == NOTHING) return p;
    Char second = char_at(p + c.size, end);
    if (second.class == LETTER && !is_newline(*p)) return run(LETTER, p + c.size + second.size, end);
    if (c.class == OTHER || (*p == ' ' && second.class == OTHER)) return others(p + c.size, end);
    stop = run(SPACE, p + c.size, end);
    for (const uint8_t *q = stop; q > p; q--)
        if (is_newline(q[-1])) return q; /* \s*[\r\n]+ */
    return space(p, stop, end);
}

const uint8_t *split_next(Split split, const uint8_t *p, const uint8_t *end) {
    return split == SPLIT_GPT4 ? next_gpt4(p, end) : next_gpt2(p, end);
}

/* In both patterns what holds a letter ends with its last letter, and so before ASCII white space.  White space ends
 * with its last newline where something else follows; the bytes tested for begin all white space beyond ASCII. */
const uint8_t *split_cut(const uint8_t *begin, const uint8_t *p, const uint8_t *end) {
    for (p += p == begin; p < end; p++) {
        int before = p[-1], after = *p;
        if ((after == ' ' || after == '\n') && before < 0x80 && unicode_ascii[before] == LETTER) return p;
        if (before != '\n' || (after < 0x80 && unicode_ascii[after] == SPACE)) continue;
        if (after != 0xC2 && after != 0xE1 && after != 0xE2 && after != 0xE3) return p;
    }
    return NULL;
}
