/** Runs SQL in a database of sql.js. */
import type { Database, SqlValue, Statement } from "sql.js";

export type Row = Record<string, SqlValue>;

/** Runs a statement and returns its rows. */
export function readRows(db: Database, sql: string, values: SqlValue[] = []): Row[] {
  const statement = db.prepare(sql, values);
  try {
    const names = statement.getColumnNames();
    const rows: Row[] = [];
    while (statement.step()) rows.push(getRow(statement, names));
    return rows;
  } finally {
    statement.free();
  }
}

/**
 * Returns the current row of a statement. sql.js has a method for it that looks the names of the
 * columns up for each row, which takes most of its time.
 */
export function getRow(statement: Statement, names: string[]): Row {
  const row: Row = {};
  for (const [index, value] of statement.get().entries()) row[names[index] ?? ""] = value;
  return row;
}

/** Runs a query and returns the first value of its first row; null without a row. */
export function readValue(db: Database, sql: string, values: SqlValue[] = []): SqlValue {
  return db.exec(sql, values)[0]?.values[0]?.[0] ?? null;
}
