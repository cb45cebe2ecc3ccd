//! Medians, and how sure they are: bootstrap intervals (Efron's percentile method), with a seeded generator, so that a
//! result can be told again from its samples.
//!
//! Left out: corrections for skew. With so few samples as a benchmark has they promise more than they keep.

use serde::{Deserialize, Serialize};

use crate::measure::Better;

/// The intervals' confidence.
pub(crate) const CONFIDENCE: f64 = 0.99;
/// With fewer samples the widest interval there is, from the least to the greatest, holds the true median less often
/// than that: 1 - 2 / 2^n.
pub(crate) const ENOUGH: u32 = 8;
/// How often samples are drawn anew.
const DRAWS: usize = 2000;

/// A small generator of random numbers (splitmix64): for shuffles and draws, never for secrets.
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        let wide = (u128::from(self.next()) * bound as u128) >> 64;
        usize::try_from(wide).expect("it is below a usize")
    }

    /// Puts `items` into a random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// One measured value, and the round that it is of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sample {
    pub(crate) round: u32,
    pub(crate) value: f64,
}

/// A median and its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Estimate {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Estimate {
    /// The median of samples; none without samples.
    pub(crate) fn of(samples: &[Sample], rng: &mut Rng) -> Option<Self> {
        let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
        let draw = |rng: &mut Rng| {
            let mut drawn: Vec<f64> = values.iter().map(|_| values[rng.below(values.len())]).collect();
            median(&mut drawn)
        };
        Self::bootstrap(median(&mut values.clone())?, draw, rng)
    }

    fn bootstrap(median: f64, draw: impl Fn(&mut Rng) -> Option<f64>, rng: &mut Rng) -> Option<Self> {
        let mut drawn = Vec::with_capacity(DRAWS);
        for _ in 0..DRAWS {
            drawn.push(draw(rng)?);
        }
        drawn.sort_by(f64::total_cmp);
        let outside = (1.0 - CONFIDENCE) / 2.0;
        Some(Self { median, low: quantile(&drawn, outside)?, high: quantile(&drawn, 1.0 - outside)? })
    }

    /// How many times what `base` costs this costs: above 1 is dearer, whichever way the measure is better.
    ///
    /// Rounds that both have are compared: what disturbs the machine for a while disturbs both of a round, and is drawn
    /// or left out for both.
    pub(crate) fn ratio(samples: &[Sample], base: &[Sample], better: Better, rng: &mut Rng) -> Option<Self> {
        let pairs: Vec<(f64, f64)> = samples
            .iter()
            .filter_map(|sample| Some((sample.value, base.iter().find(|other| other.round == sample.round)?.value)))
            .collect();
        let of = |pairs: &[(f64, f64)]| {
            let (mut own, mut others): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
            quotient(median(&mut own)?, median(&mut others)?, better)
        };
        let draw = |rng: &mut Rng| {
            let drawn: Vec<(f64, f64)> = pairs.iter().map(|_| pairs[rng.below(pairs.len())]).collect();
            of(&drawn)
        };
        Self::bootstrap(of(&pairs)?, draw, rng).filter(|_| pairs.len() >= ENOUGH as usize)
    }

    /// As [`Self::ratio`], of samples of different runs, whose rounds have nothing to do with each other.
    pub(crate) fn ratio_of_runs(now: &[Sample], before: &[Sample], better: Better, rng: &mut Rng) -> Option<Self> {
        let values = |samples: &[Sample]| samples.iter().map(|sample| sample.value).collect::<Vec<_>>();
        let (now, before) = (values(now), values(before));
        let redraw = |values: &[f64], rng: &mut Rng| {
            let mut drawn: Vec<f64> = values.iter().map(|_| values[rng.below(values.len())]).collect();
            median(&mut drawn)
        };
        let draw = |rng: &mut Rng| quotient(redraw(&now, rng)?, redraw(&before, rng)?, better);
        let whole = quotient(median(&mut now.clone())?, median(&mut before.clone())?, better)?;
        Self::bootstrap(whole, draw, rng).filter(|_| now.len().min(before.len()) >= ENOUGH as usize)
    }

    /// Whether this, a ratio, says that there is a difference: its interval excludes 1.
    pub(crate) fn differs(&self) -> bool {
        self.low > 1.0 || self.high < 1.0
    }
}

/// What costs more is above 1. Without cost there is nothing to compare with.
fn quotient(own: f64, base: f64, better: Better) -> Option<f64> {
    let (above, below) = if better == Better::Lower { (own, base) } else { (base, own) };
    (above > 0.0 && below > 0.0).then(|| above / below)
}

/// The median; none of nothing.
pub(crate) fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    let upper = *values.get(half)?;
    Some(if values.len().is_multiple_of(2) { f64::midpoint(values[half - 1], upper) } else { upper })
}

/// The spread of values around their median, as a part of it: half the distance between the quartiles.
pub(crate) fn spread(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    let median = median(&mut sorted).filter(|median| *median > 0.0)?;
    Some((quantile(&sorted, 0.75)? - quantile(&sorted, 0.25)?) / 2.0 / median)
}

fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = part * last as f64;
    let below = sorted.iter().enumerate().take_while(|(at, _)| *at as f64 <= place).last()?;
    let above = sorted[(below.0 + 1).min(last)];
    Some(below.1 + (above - below.1) * (place - below.0 as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value about 100, as skewed as times are: seldom much more, never much less.
    fn noisy(rng: &mut Rng, spread: f64) -> f64 {
        let mut uniform = || rng.below(1 << 30) as f64 / f64::from(1 << 30);
        let normal: f64 = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
        100.0 * (spread * normal).exp()
    }

    fn samples(rng: &mut Rng, rounds: u32, factor: f64) -> Vec<Sample> {
        (0..rounds).map(|round| Sample { round, value: factor * noisy(rng, 0.03) }).collect()
    }

    /// How many of 400 comparisons see a difference.
    fn seen(rounds: u32, factor: f64, better: Better) -> usize {
        let mut rng = Rng::new(7);
        let one = |rng: &mut Rng| {
            let (own, base) = (samples(rng, rounds, factor), samples(rng, rounds, 1.0));
            Estimate::ratio(&own, &base, better, rng).unwrap().differs()
        };
        (0..400).filter(|_| one(&mut rng)).count()
    }

    #[test]
    fn the_same_contender_twice_shows_no_difference_but_for_one_in_a_hundred() {
        for rounds in [8, 10, 30] {
            let wrong = seen(rounds, 1.0, Better::Lower);
            assert!(wrong <= 8, "{wrong} of 400 with {rounds} rounds");
        }
    }

    #[test]
    fn a_planted_slowdown_of_a_tenth_is_found() {
        for (rounds, factor, better) in [
            (8, 1.1, Better::Lower),
            (10, 1.1, Better::Lower),
            (10, 1.0 / 1.1, Better::Higher),
            (30, 1.1, Better::Lower),
        ] {
            let found = seen(rounds, factor, better);
            assert!(found >= 380, "{found} of 400 with {rounds} rounds");
        }
    }

    #[test]
    fn a_ratio_above_1_is_dearer_whichever_way_is_better() {
        let at = |value| (0..8).map(|round| Sample { round, value }).collect::<Vec<_>>();
        let mut rng = Rng::new(1);
        let slower = Estimate::ratio(&at(20.0), &at(10.0), Better::Lower, &mut rng).unwrap();
        let less = Estimate::ratio(&at(10.0), &at(20.0), Better::Higher, &mut rng).unwrap();
        assert_eq!((slower.median, less.median), (2.0, 2.0));
        assert!(slower.differs() && less.differs());
    }

    #[test]
    fn too_few_rounds_in_common_make_no_ratio() {
        let at = |first: u32| (first..first + 10).map(|round| Sample { round, value: 1.0 }).collect::<Vec<_>>();
        let mut rng = Rng::new(1);
        assert_eq!(Estimate::ratio(&at(0), &at(3), Better::Lower, &mut rng), None);
        assert!(Estimate::ratio(&at(0), &at(2), Better::Lower, &mut rng).is_some());
        assert_eq!(Estimate::of(&[], &mut rng), None);
    }

    #[test]
    fn a_disturbance_of_whole_rounds_does_not_hide_a_difference() {
        let mut rng = Rng::new(3);
        let disturbed: Vec<f64> = (0..10).map(|round| if round % 2 == 0 { 1.0 } else { 3.0 }).collect();
        let of = |factor: f64| {
            let at = |(round, times): (u32, &f64)| Sample { round, value: factor * times };
            (0..).zip(&disturbed).map(at).collect::<Vec<_>>()
        };
        assert!(Estimate::ratio(&of(1.1), &of(1.0), Better::Lower, &mut rng).unwrap().differs());
    }

    #[test]
    fn the_median_and_the_spread_are_as_defined() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(spread(&[8.0, 9.0, 10.0, 11.0, 12.0]), Some(0.1));
    }

    #[test]
    fn the_same_seed_gives_the_same_order() {
        let order = |seed| {
            let mut items: Vec<u32> = (0..10).collect();
            Rng::new(seed).shuffle(&mut items);
            items
        };
        assert_eq!(order(5), order(5));
        assert_ne!(order(5), order(6));
    }
}
