/**
 * The upgrade of the table from Square's blog post of 2018. That table has no key, so a customer can be in it
 * twice. Nothing else in the kit knows about it.
 */
import type { Database } from "sql.js";
import { readNumber } from "./sql.ts";

const COLUMNS = [
  "id",
  "created_at",
  "updated_at",
  "synced_at",
  "given_name",
  "family_name",
  "email_address",
  "creation_source",
];

/** Recognizes the table by its columns, in lower case. */
export function is2018Table(columns: readonly string[]): boolean {
  return !columns.includes("local_id") && COLUMNS.every((column) => columns.includes(column));
}

/**
 * Moves the rows of the 2018 table into the new one. Of several rows with the same id, the one that was
 * updated last is taken whole: combining columns of two rows would invent a customer.
 *
 * The old table is dropped only if nothing in it is lost by that. It stays under its new name if rows with
 * the same id were left out, or if it has columns, indexes or triggers of the user's own.
 * @param oldTable the name that the old table has now
 * @param oldColumns its columns
 */
export function move2018Rows(
  db: Database,
  table: string,
  oldTable: string,
  oldColumns: readonly string[],
): void {
  // A blank id is treated as NULL. Such rows are different customers, although their ids are equal.
  const id = "nullif(trim(id), '')";
  const values = COLUMNS.map((column) => {
    if (column === "id") return id;
    return column.endsWith("_at") ? formatTime(column) : column;
  });
  // In a query with max(), SQLite takes the other columns of a group from the row that has the maximum.
  db.run(`INSERT INTO ${table} (${COLUMNS.join(", ")})
    SELECT ${values.join(", ")} FROM (
      SELECT *, _rowid_ AS position, max(coalesce(${formatTime("updated_at")}, '')) FROM ${oldTable}
      GROUP BY coalesce(${id}, _rowid_)
    ) ORDER BY position`);

  const movedRows = readNumber(db, `SELECT count(*) FROM ${table}`);
  const oldRows = readNumber(db, `SELECT count(*) FROM ${oldTable}`);
  // Counts the table itself, its indexes and its triggers.
  const objects = readNumber(db, "SELECT count(*) FROM sqlite_master WHERE tbl_name = ?", [
    oldTable,
  ]);
  if (movedRows === oldRows && oldColumns.length === COLUMNS.length && objects === 1)
    db.run(`DROP TABLE ${oldTable}`);
}

// Formats a time as UTC with milliseconds. A text that does not look like a date stays as it is: strftime
// would read 2018, for example, as a Julian day number.
function formatTime(column: string): string {
  const formatted = `strftime('%Y-%m-%dT%H:%M:%fZ', ${column})`;
  return `coalesce(iif(${column} LIKE '____-__-__%', ${formatted}, NULL), ${column})`;
}
