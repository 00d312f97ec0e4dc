/* AMX on memory: what its instructions do to eight tiles, by the pseudocode of Intel's manual
 * (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2).
 *
 * A tile has rows of some bytes, which ldtilecfg sets and clears. What raises an exception there
 * ends the process here. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int rows, bytes; uint8_t data[16][64]; } Tile;
static __thread Tile tiles[8];
static __thread int configured;

static void must(int holds) { if (!holds) abort(); }

void amx_ldtilecfg(const uint8_t *from) {
  memset(tiles, 0, sizeof tiles);
  must(from[0] == 1 && from[1] == 0);
  for (int i = 2; i < 16; i++) must(from[i] == 0);
  for (int t = 0; t < 8; t++) {
    tiles[t].bytes = from[16 + 2 * t] | from[17 + 2 * t] << 8;
    tiles[t].rows = from[48 + t];
    must(tiles[t].bytes <= 64 && tiles[t].rows <= 16);
    must(!tiles[t].bytes == !tiles[t].rows);
  }
  configured = 1;
}

static Tile *used(uint8_t t) { return must(configured && t < 8 && tiles[t].rows), &tiles[t]; }

void amx_tilezero(uint8_t t) { memset(used(t)->data, 0, sizeof tiles[t].data); }

void amx_tileloadd64(uint8_t t, const uint8_t *from, int64_t stride) {
  Tile *tile = used(t);
  memset(tile->data, 0, sizeof tile->data);
  for (int r = 0; r < tile->rows; r++) memcpy(tile->data[r], from + r * stride, tile->bytes);
}

void amx_tilestored64(uint8_t t, uint8_t *to, int64_t stride) {
  Tile *tile = used(t);
  for (int r = 0; r < tile->rows; r++) memcpy(to + r * stride, tile->data[r], tile->bytes);
}

static void fits(Tile *c, Tile *a, Tile *b) {
  must(c != a && c != b && a != b);
  must(c->rows == a->rows && c->bytes == b->bytes && a->bytes == 4 * b->rows);
}

void amx_tdpbssd(uint8_t sums, uint8_t left, uint8_t right) {
  Tile *c = used(sums), *a = used(left), *b = used(right);
  fits(c, a, b);
  for (int m = 0; m < c->rows; m++)
    for (int k = 0; k < b->rows; k++)
      for (int n = 0; n < c->bytes / 4; n++) {
        int32_t sum;
        memcpy(&sum, c->data[m] + 4 * n, 4);
        for (int i = 0; i < 4; i++)
          sum += (int8_t)a->data[m][4 * k + i] * (int8_t)b->data[k][4 * n + i];
        memcpy(c->data[m] + 4 * n, &sum, 4);
      }
}

static float wide(const uint8_t *from) {
  uint32_t bits = (uint32_t)(from[0] | from[1] << 8) << 16;
  float value;
  return memcpy(&value, &bits, 4), value;
}

void amx_tdpbf16ps(uint8_t sums, uint8_t left, uint8_t right) {
  Tile *c = used(sums), *a = used(left), *b = used(right);
  fits(c, a, b);
  for (int m = 0; m < c->rows; m++)
    for (int k = 0; k < b->rows; k++)
      for (int n = 0; n < c->bytes / 4; n++) {
        float sum;
        memcpy(&sum, c->data[m] + 4 * n, 4);
        for (int i = 0; i < 2; i++)
          sum += wide(a->data[m] + 4 * k + 2 * i) * wide(b->data[k] + 4 * n + 2 * i);
        memcpy(c->data[m] + 4 * n, &sum, 4);
      }
}
