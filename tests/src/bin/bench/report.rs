//! Figures of several contenders over several runs, as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

/// One thing measured: for each run, one value per contender.
pub struct Figure {
    name: String,
    unit: &'static str,
    runs: Vec<Vec<f64>>,
}

/// All figures of one benchmark.
pub struct Report {
    title: String,
    contenders: Vec<String>,
    figures: Vec<Figure>,
}

impl Report {
    /// An empty report.
    pub fn new(title: impl Into<String>, contenders: Vec<String>) -> Self {
        Self { title: title.into(), contenders, figures: Vec::new() }
    }

    /// Adds the value of contender number `contender` in run number `run`.
    pub fn add(&mut self, name: &str, unit: &'static str, run: usize, contender: usize, value: f64) {
        let at = match self.figures.iter().position(|f| f.name == name) {
            Some(at) => at,
            None => {
                self.figures.push(Figure { name: name.to_owned(), unit, runs: Vec::new() });
                self.figures.len() - 1
            }
        };
        let runs = &mut self.figures[at].runs;
        runs.resize_with(runs.len().max(run + 1), Vec::new);
        let values = &mut runs[run];
        values.resize(values.len().max(contender + 1), f64::NAN);
        values[contender] = value;
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = format!("{}\n{:<36}", self.title, "");
        for name in &self.contenders {
            let _ = write!(out, "{name:>16}");
        }
        if self.contenders.len() > 1 {
            let _ = write!(out, "{:>12}{:>16}", "ratio", "quartiles");
        }
        out.push('\n');
        for figure in &self.figures {
            let _ = write!(out, "{:<36}", format!("{} ({})", figure.name, figure.unit));
            for contender in 0..self.contenders.len() {
                let _ = write!(out, "{:>16.3}", quantile(&figure.of(contender), 0.5));
            }
            let ratios = figure.ratios();
            if !ratios.is_empty() {
                let [low, middle, high] = [0.25, 0.5, 0.75].map(|q| quantile(&ratios, q));
                let _ = write!(out, "{middle:>12.3}{:>16}", format!("{low:.3}-{high:.3}"));
            }
            out.push('\n');
        }
        out
    }

    /// For programs: every value of every run.
    pub fn json(&self) -> String {
        let figures: Vec<Value> = self
            .figures
            .iter()
            .map(|f| {
                let ratios = f.ratios();
                json!({
                    "name": f.name,
                    "unit": f.unit,
                    "median": (0..self.contenders.len()).map(|c| quantile(&f.of(c), 0.5)).collect::<Vec<_>>(),
                    "ratio": (!ratios.is_empty()).then(|| [0.25, 0.5, 0.75].map(|q| quantile(&ratios, q))),
                    "runs": f.runs,
                })
            })
            .collect();
        let all = json!({"benchmark": self.title, "contenders": self.contenders, "figures": figures});
        format!("{all:#}\n")
    }
}

impl Figure {
    fn of(&self, contender: usize) -> Vec<f64> {
        self.runs.iter().filter_map(|run| run.get(contender).copied()).filter(|v| !v.is_nan()).collect()
    }

    /// The first contender's value over the second's, run by run.
    fn ratios(&self) -> Vec<f64> {
        let ratio = |run: &Vec<f64>| Some(run.first()? / run.get(1)?);
        self.runs.iter().filter_map(ratio).filter(|r| r.is_finite()).collect()
    }
}

/// The `q` quantile of `values`, interpolated; NaN if there are none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * at.fract()
}
