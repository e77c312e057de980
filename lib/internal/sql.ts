/** Runs SQL in a database of sql.js. */
import type { Database, SqlValue } from "sql.js";

export type Row = Record<string, SqlValue>;

/** Runs a statement and returns its rows. */
export function readRows(db: Database, sql: string, values: SqlValue[] = []): Row[] {
  const statement = db.prepare(sql, values);
  const rows: Row[] = [];
  try {
    while (statement.step()) rows.push(statement.getAsObject());
  } finally {
    statement.free();
  }
  return rows;
}

/** Runs a query and returns the first value of its first row; null without a row. */
export function readValue(db: Database, sql: string, values: SqlValue[] = []): SqlValue {
  return db.exec(sql, values)[0]?.values[0]?.[0] ?? null;
}
