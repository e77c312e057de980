/**
 * Upgrades the table from Square's blog post of 2018. That table has no UNIQUE index on the id, so
 * several rows can be the same customer.
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

/**
 * Recognizes the table by its columns.
 * @param columns the names in lower case
 */
export function is2018Table(columns: readonly string[]): boolean {
  return !columns.includes("local_id") && COLUMNS.every((column) => columns.includes(column));
}

/**
 * Moves the rows of the 2018 table to the new one. Of several rows with the same id, only the row
 * that was updated last is moved. They are not combined, because a row with columns from several of
 * them would describe a customer that never existed.
 *
 * The old table is dropped if nothing would be lost with it. It is kept if rows with the same id
 * were left out, or if the user has added columns, indexes or triggers.
 * @param oldTable the new name of the old table
 * @param oldColumns the columns of the old table
 * @returns whether the old table is kept
 */
export function move2018Rows(
  db: Database,
  table: string,
  oldTable: string,
  oldColumns: readonly string[],
): boolean {
  // A blank id becomes NULL. Rows with a blank id are different customers, so each of them is
  // moved.
  const id = "nullif(trim(id), '')";
  // The scripts take an id without a time in synced_at for the user's own number. All ids of the
  // 2018 table came from Square, so such a row gets a time of 1970.
  const syncedAt = buildTimeExpression("synced_at");
  const hasSyncTime = `coalesce(${syncedAt}, '') LIKE '____-__-__%'`;
  const values = COLUMNS.map((column) => {
    if (column === "id") return id;
    if (column === "synced_at")
      return `iif(${id} IS NULL OR ${hasSyncTime}, ${syncedAt}, '1970-01-01T00:00:00.000Z')`;
    return column.endsWith("_at") ? buildTimeExpression(column) : column;
  });
  // In a query with max(), SQLite takes the other columns from the row with the maximum.
  db.run(`INSERT INTO ${table} (${COLUMNS.join(", ")})
    SELECT ${values.join(", ")} FROM (
      SELECT *, _rowid_ AS position, max(coalesce(${buildTimeExpression("updated_at")}, ''))
      FROM ${oldTable}
      GROUP BY coalesce(${id}, _rowid_)
    ) ORDER BY position`);

  const movedRows = readNumber(db, `SELECT count(*) FROM ${table}`);
  const oldRows = readNumber(db, `SELECT count(*) FROM ${oldTable}`);
  // This counts the table, its indexes and its triggers. It is 1 if the table has no index and no
  // trigger.
  const objectsSql = "SELECT count(*) FROM sqlite_master WHERE tbl_name = ?";
  const objects = readNumber(db, objectsSql, [oldTable]);
  const isEverythingMoved =
    movedRows === oldRows && oldColumns.length === COLUMNS.length && objects === 1;
  if (isEverythingMoved) db.run(`DROP TABLE ${oldTable}`);
  return !isEverythingMoved;
}

// Builds SQL that formats the time in a column as UTC with milliseconds. A text that does not look
// like a date stays as it is. For example, strftime would read 2018 as a Julian day number.
function buildTimeExpression(column: string): string {
  const formatted = `strftime('%Y-%m-%dT%H:%M:%fZ', ${column})`;
  return `coalesce(iif(${column} LIKE '____-__-__%', ${formatted}, NULL), ${column})`;
}
