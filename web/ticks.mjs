// Round numbers for the axes of a chart.

const exact = (value) => Number(value.toPrecision(12)); // 0.3, not 0.30000000000000004

/** Multiples of 1, 2 or 5 times a power of ten from `low` to `high`: at most `count`, `least` apart. */
export function linear(low, high, count, least = 0) {
  const rough = Math.max((high - low) / count, least, Number.MIN_VALUE);
  const power = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10].map((digit) => exact(digit * power)).find((size) => size >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / apart); i * apart <= high; i++) ticks.push(exact(i * apart));
  return ticks;
}

/** At most `count` round numbers from `low` to `high`, both above 0, for a logarithmic axis. */
export function logarithmic(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  for (const [digits, every] of [[[1, 2, 5], 1], [[1], 1], [[1], 2], [[1], 4], [[1], 8]]) {
    const ticks = [];
    for (let power = first; power <= last; power++) {
      if (power % every === 0) ticks.push(...digits.map((digit) => exact(digit * 10 ** power)));
    }
    const shown = ticks.filter((tick) => tick >= low && tick <= high);
    // Less than a decade may contain only one of these, or none.
    if (shown.length < 2) return linear(low, high, count);
    if (shown.length <= count) return shown;
  }
  return [low, high];
}
