//! What was measured, and how it compares. Measures nothing.

use serde_json::{Value, json};

/// One measured thing.
pub struct Row {
    pub name: &'static str,
    pub unit: &'static str,
    values: Vec<f64>,
}

/// Two rows against each other.
pub struct Ratio {
    pub name: &'static str,
    pub value: f64,
    /// The most that it may be; without one it is only told.
    pub target: Option<f64>,
}

/// All of it, in the order in which it is told.
#[derive(Default)]
pub struct Figures {
    pub rows: Vec<Row>,
    pub ratios: Vec<Ratio>,
}

impl Row {
    /// The value that the fraction `at` of all is not above.
    pub fn quantile(&self, at: f64) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        // Between the two nearest ones, as NumPy has it.
        let place = at * (sorted.len() - 1) as f64;
        let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }

    pub fn count(&self) -> usize {
        self.values.len()
    }
}

impl Ratio {
    pub fn is_missed(&self) -> bool {
        self.target.is_some_and(|target| self.value > target)
    }
}

impl Figures {
    /// Takes what was measured of one thing; nothing if there was nothing.
    pub fn add(&mut self, name: &'static str, unit: &'static str, values: Vec<f64>) {
        if !values.is_empty() {
            self.rows.push(Row { name, unit, values });
        }
    }

    /// Divides the median of a row by that of another, if there are both.
    pub fn compare(&mut self, ratio: &'static str, ours: &str, theirs: &str, target: Option<f64>) {
        let median = |name| self.rows.iter().find(|row| row.name == name).map(|row| row.quantile(0.5));
        if let (Some(ours), Some(theirs)) = (median(ours), median(theirs)) {
            self.ratios.push(Ratio { name: ratio, value: ours / theirs, target });
        }
    }

    /// Holds the median of a row against the most that it is to be.
    pub fn bound(&mut self, ratio: &'static str, row: &str, most: f64) {
        if let Some(row) = self.rows.iter().find(|found| found.name == row) {
            self.ratios.push(Ratio { name: ratio, value: row.quantile(0.5) / most, target: Some(1.0) });
        }
    }

    pub fn to_json(&self) -> Value {
        let row = |row: &Row| {
            json!({"name": row.name, "unit": row.unit, "n": row.count(), "median": row.quantile(0.5),
                "p10": row.quantile(0.1), "p90": row.quantile(0.9), "p99": row.quantile(0.99), "values": row.values})
        };
        let ratio = |ratio: &Ratio| {
            let met = ratio.target.map(|_| !ratio.is_missed());
            json!({"name": ratio.name, "ratio": ratio.value, "target": ratio.target, "met": met})
        };
        json!({"measurements": self.rows.iter().map(row).collect::<Vec<_>>(),
            "ratios": self.ratios.iter().map(ratio).collect::<Vec<_>>()})
    }
}
